// Threads of the library's own.
#pragma once
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#include <signal.h>
#endif

#include <system_error>
#include <thread>
#include <utility>

namespace bigkernels {

// Runs `body` in a detached thread; false if the system gives none. Signals are for the program's own threads, but for
// those that a thread gives itself.
template <class Body>
bool start_own_thread(Body&& body) {
#if defined(__unix__) || defined(__APPLE__)
  sigset_t all, before;
  sigfillset(&all);
  for (int own : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGABRT, SIGSYS}) sigdelset(&all, own);
  pthread_sigmask(SIG_SETMASK, &all, &before);
#endif
  bool started = true;
  try {
    std::thread(std::forward<Body>(body)).detach();
  } catch (const std::system_error&) {
    started = false;
  }
#if defined(__unix__) || defined(__APPLE__)
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
#endif
  return started;
}

}  // namespace bigkernels
