// A proxy that is a process of its own, so that its descriptors, threads,
// memory and CPU time can be measured from outside.

#ifndef WARMPROXY_TESTS_FIGURES_HPP
#define WARMPROXY_TESTS_FIGURES_HPP

#include "support.hpp"

#include <doctest/doctest.h>

#include <sys/resource.h>

namespace support {

// Whether tests of load and endurance run at full length; otherwise they take
// seconds.
inline const bool in_full = environment_or("WARMPROXY_TEST_LONG", "") == "1";

struct Figures {
  std::size_t fds;
  long threads;
  long rss; // kB
};

// kill(2) with a check: 0 or -1 would kill more than one process.
inline void kill_one(long pid) {
  if (pid <= 1) { throw Error("not a process: " + std::to_string(pid)); }
  kill(static_cast<pid_t>(pid), SIGKILL);
}

// The CPU time that a process has used so far.
inline Milliseconds cpu_time(pid_t pid) {
  const auto stat = read_file(proc_file(pid, "stat"));
  std::istringstream in(stat.substr(std::min(stat.rfind(')'), stat.size())));
  std::string skipped;
  long user = 0, system = 0;
  for (int i = 0; i < 12; ++i) { // ")", the state, ten numbers
    in >> skipped;
  }
  in >> user >> system;
  return Milliseconds((user + system) * 1000 / sysconf(_SC_CLK_TCK));
}

// Whether a process uses no CPU time, judged over half a second: a process that
// spins uses nearly all of it, one that waits nearly none.
inline bool rests(pid_t pid) {
  const auto before = cpu_time(pid);
  const auto until = Clock::now() + Milliseconds(500);
  wait_for([&] { return Clock::now() >= until; });
  return cpu_time(pid) - before < Milliseconds(125);
}

// build/warmproxy with a status path, read on a connection of its own.
class Watched : public ServeProcess {
public:
  explicit Watched(Environment environment)
      : ServeProcess(with_status(std::move(environment))) {}

  // A value of the status as text.
  std::string status(const std::string &name) {
    const auto json = read_status();
    const auto at = json.find('"' + name + "\":");
    if (at == std::string::npos) { throw Error("no " + name + " in " + json); }
    const auto begin = at + name.size() + 3;
    return json.substr(begin, json.find_first_of(",}", begin) - begin);
  }
  long number(const std::string &name) {
    return std::atol(status(name).c_str());
  }
  bool reaches(const std::string &state) {
    return wait_for([&] { return status("state") == '"' + state + '"'; });
  }
  // Whether no connection is left but that for the status.
  bool alone() {
    return wait_for(
        [&] { return number("connections") == 1 && number("in_flight") == 0; });
  }
  Figures figures() const {
    return {open_fds(pid()), threads(pid()), rss_kb(pid())};
  }
  // Whether descriptors and threads return to `before`; a thread ends a moment
  // after its connection.
  bool comes_back_to(const Figures &before) {
    return wait_for([&] {
      const auto now = figures();
      return now.fds == before.fds && now.threads == before.threads;
    });
  }

private:
  // On a connection that stays open, unless it had to make room for another.
  std::string read_status() {
    if (!status_client_ || status_client_->readable()) {
      status_client_ = std::make_unique<RawClient>(port());
    }
    return status_client_->get("/-/status").body;
  }

  static Environment with_status(Environment environment) {
    environment.emplace("WARMPROXY_STATUS_PATH", "/-/status");
    return environment;
  }

  std::unique_ptr<RawClient> status_client_;
};

// build/warmproxy, started by a shell script that prepares its surroundings and
// ends with `exec "$@"`.
class Within : public Process {
public:
  Within(const std::string &script, Environment environment,
         const std::string &program = built("warmproxy"))
      : Within(script, complete(std::move(environment)), program, 0) {}

  int port() const { return port_; }

private:
  Within(const std::string &script, const Environment &environment,
         const std::string &program, int)
      : Process("/bin/sh", {"-c", script, "sh", program}, environment),
        port_(std::atoi(environment.at("PORT").c_str())) {
    if (!wait_for([&] { return listening(port_) || !running(); }) ||
        !running()) {
      throw Error("warmproxy does not listen; it printed: " + err());
    }
  }

  static Environment complete(Environment environment) {
    environment.emplace("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    environment.emplace("HOST", "127.0.0.1");
    environment.emplace("PORT", std::to_string(free_port()));
    environment.emplace("WARMPROXY_STATUS_PATH", "/-/status");
    return environment;
  }

  int port_;
};

// Raises the test's own limit on open files. False if that is not possible.
inline bool room_for(rlim_t descriptors) {
  rlimit files{};
  getrlimit(RLIMIT_NOFILE, &files);
  if (files.rlim_cur < descriptors) {
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
  }
  return files.rlim_cur >= descriptors;
}

} // namespace support

#endif
