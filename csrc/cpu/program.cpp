// Runs of step programs: where they live, and the calls of which one consists.
#include <algorithm>
#include <memory>
#include <mutex>
#include <vector>
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

#include "program_team.h"

namespace bigkernels {
namespace {

constexpr size_t kPlaces = 4;                 // more only while threads are inside these, or callers hold them
constexpr int64_t kKept = int64_t{32} << 20;  // bytes of a place that nobody holds

struct Places {
  std::mutex mutex;
  std::vector<std::unique_ptr<Place>> all;  // the last used in front
  int64_t number = 0;

  Place* take(const RunShape& shape) {
    std::lock_guard<std::mutex> lock(mutex);
    auto chosen = all.end();
    for (auto p = all.begin(); p != all.end(); ++p) {
      if ((*p)->held || is_occupied(p->get())) continue;
      if ((*p)->run.matches(shape)) {
        chosen = p;
        break;
      }
      if (all.size() >= kPlaces) chosen = p;  // the one that has not been used for longest
    }
    if (chosen == all.end()) chosen = all.insert(all.begin(), std::make_unique<Place>());
    std::rotate(all.begin(), chosen, chosen + 1);
    Place* place = all.front().get();
    place->held = true, place->number = ++number, place->stop = -1;
    return place;
  }
};

// Never destroyed: threads end with the process, after it would be.
Places& places() {
  static Places* const instance = [] {
    auto p = new Places;
#if defined(__unix__) || defined(__APPLE__)
    pthread_atfork([] { places().mutex.lock(); }, [] { places().mutex.unlock(); }, [] { places().mutex.unlock(); });
#endif
    return p;
  }();
  return *instance;
}

}  // namespace

std::string program_start(const RunInput& in, Place** out) {
  RunInput input = in;
  input.threads = std::clamp<int64_t>(in.threads, 1, kMaxThreads);
  Place* place = places().take({in.program->id, in.run.batch, in.run.tokens, in.run.keep, input.threads});
  std::string why;
  try {
    why = place->run.start(input);
  } catch (...) {
    program_finish(place);
    throw;
  }
  if (!why.empty())
    program_finish(place);
  else
    *out = place;
  return why;
}

int64_t program_step(Place* place) {
  ProgramRun& run = place->run;
  const std::vector<Step>& steps = run.plan().steps;
  auto is_stop = [&](int64_t i) { return i < (int64_t)steps.size() && steps[i].work == Work::call; };
  int64_t at = run.at.load(std::memory_order_acquire);
  if (place->stop == at && is_stop(at)) run.at.fetch_add(1, std::memory_order_acq_rel), ++at;
  int64_t end = at;
  while (end < (int64_t)steps.size() && !is_stop(end)) ++end;
  run_steps(place, end);
  place->stop = end;
  return is_stop(end) ? steps[end].index : -1;
}

float* program_value(Place* place, int64_t value, bool write, int64_t* rows, int64_t* width) {
  return place->run.value(value, write, rows, width);
}

void program_finish(Place* place) {
  std::lock_guard<std::mutex> lock(places().mutex);
  if (place->run.bytes() > kKept && !is_occupied(place)) place->run.release();
  place->held = false;
}

int64_t program_number(const Place* place) { return place->number; }

Place* program_find(int64_t number) {
  std::lock_guard<std::mutex> lock(places().mutex);
  for (auto& p : places().all)
    if (p->held && p->number == number) return p.get();
  return nullptr;
}

int64_t program_kept() {
  std::lock_guard<std::mutex> lock(places().mutex);
  int64_t bytes = 0;
  for (auto& p : places().all)
    if (!p->held) bytes += p->run.bytes();
  return bytes;
}

int64_t program_release() {
  std::lock_guard<std::mutex> lock(places().mutex);
  int64_t bytes = 0;
  for (auto& p : places().all) {
    if (p->held || is_occupied(p.get())) continue;
    bytes += p->run.bytes();
    p->run.release();
  }
  return bytes;
}

void program_settle() { settle_team(); }

std::pair<int64_t, int64_t> program_delays(int64_t every) {
  delay_team(every);
  return {team_counts.taken_over.exchange(0), team_counts.made_again.exchange(0)};
}

}  // namespace bigkernels
