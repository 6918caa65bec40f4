// Walks programs: one thread, for now.
#include <algorithm>
#include <memory>
#include <mutex>
#include <vector>

#include "program_run.h"

namespace bigkernels {
namespace {

struct Place {
  ProgramRun run;
  Worker worker;
};

constexpr size_t kPlaces = 4;
constexpr int64_t kKept = int64_t{32} << 20;  // bytes of a place that is not used

// Never destroyed: threads end after it would be.
struct Places {
  std::mutex mutex;
  std::vector<std::unique_ptr<Place>> all;  // the last used in front
  int64_t number = 0;

  Place* take(const RunShape& shape) {
    std::lock_guard<std::mutex> lock(mutex);
    auto found = all.end();
    for (auto p = all.begin(); p != all.end(); ++p)
      if (!(*p)->run.held && (*p)->run.matches(shape)) {
        found = p;
        break;
      }
    if (found == all.end() && all.size() >= kPlaces)
      for (auto p = all.begin(); p != all.end(); ++p)
        if (!(*p)->run.held) found = p;  // the one that has not been used for longest
    if (found == all.end()) found = all.insert(all.begin(), std::make_unique<Place>());
    std::rotate(all.begin(), found, found + 1);
    all.front()->run.held = true, all.front()->run.number = ++number;
    return all.front().get();
  }
};
Places& places() {
  static Places* const made = new Places;
  return *made;
}
Place* place_of(ProgramRun* run) { return (Place*)run; }

}  // namespace

std::string program_start(const RunInput& in, ProgramRun** out) {
  RunInput input = in;
  input.threads = 1;
  Place* place = places().take({in.program->id, in.run.batch, in.run.tokens, in.run.keep, input.threads});
  std::string why;
  try {
    why = place->run.start(input);
  } catch (...) {
    program_finish(&place->run);
    throw;
  }
  if (!why.empty())
    program_finish(&place->run);
  else
    *out = &place->run;
  return why;
}

std::string program_step(ProgramRun* run, int64_t* stop) {
  const Plan& plan = run->plan();
  Worker& w = place_of(run)->worker;
  run->enter(w);
  const int64_t end = (int64_t)plan.steps.size();
  if (run->at < end && plan.steps[run->at].work == Work::call) ++run->at;
  for (; run->at < end && plan.steps[run->at].work != Work::call; ++run->at) {
    const Step& s = plan.steps[run->at];
    run->prepare(s, w);
    for (int64_t c = 0, n = run->chunks(s); c < n; ++c) run->make(s, c, w);
  }
  *stop = run->at < end ? plan.steps[run->at].index : -1;
  return "";
}

float* program_value(ProgramRun* run, int64_t value, bool write, int64_t* rows, int64_t* width) {
  return run->value(value, write, rows, width);
}

void program_finish(ProgramRun* run) {
  std::lock_guard<std::mutex> lock(places().mutex);
  if (run->bytes() > kKept) run->release();
  run->held = false;
}

int64_t program_number(const ProgramRun* run) { return run->number; }

ProgramRun* program_find(int64_t number) {
  std::lock_guard<std::mutex> lock(places().mutex);
  for (auto& p : places().all)
    if (p->run.held && p->run.number == number) return &p->run;
  return nullptr;
}

void program_settle() {}

}  // namespace bigkernels
