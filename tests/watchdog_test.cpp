// The watchdog process: if warmproxy is killed, no process of the target stays
// behind.

#include "in_progress.hpp"

using namespace support;

TEST_CASE("watchdog: SIGKILL leaves no process behind") {
  TemporaryDirectory directory;
  for (const auto &activity : activities(directory)) {
    CAPTURE(activity.name);
    for (const bool group : {false, true}) {
      CAPTURE(group);
      unlink((directory / "gate").c_str());
      auto args = activity.args;
      args.insert(args.end(), {"--fork-worker", "--ignore-term"});
      if (activity.name == "a start") { args.push_back("--never-listen"); }
      Marked proxy(args);
      RawClient client(proxy.port());
      begin(activity, proxy, client);
      CHECK(wait_for([&] { return proxy.processes().size() == 4; }));
      kill(group ? -proxy.pid() : proxy.pid(), SIGKILL);
      CHECK(proxy.wait() == 128 + SIGKILL);
      CHECK(proxy.nothing_left());
    }
  }
}

TEST_CASE("watchdog: SIGKILL at any moment of a start or a stop") {
  const int rounds = in_full ? 300 : 30;
  for (int round = 0; round < rounds; ++round) {
    Marked proxy({"--fork-worker", "--ignore-term"},
                 {{"WARMPROXY_PREWARM", "1"},
                  {"WARMPROXY_STOP_TIMEOUT", "20ms"},
                  {"WARMPROXY_IDLE_STOP", "10ms"}});
    // It starts and stops the target in about 40 ms.
    RawClient client(proxy.port());
    client.send("GET /pid HTTP/1.1\r\nHost: test\r\n\r\n");
    const auto until =
        Clock::now() + std::chrono::microseconds(60000 * round / rounds);
    wait_for([&] { return Clock::now() >= until; });
    kill(proxy.pid(), SIGKILL);
    CHECK(proxy.wait() == 128 + SIGKILL);
    CHECK(proxy.nothing_left());
  }
}

TEST_CASE("watchdog: without it the target is still stopped") {
  Marked proxy({"--fork-worker"}, {{"WARMPROXY_STOP_TIMEOUT", "200ms"}});
  const auto before = proxy.processes();
  CHECK(get(proxy.port()).status == 200);
  for (const auto pid : before) {
    if (pid != proxy.pid()) { kill(pid, SIGKILL); }
  }
  CHECK(get(proxy.port()).status == 200);
  SUBCASE("on SIGTERM to warmproxy") {
    proxy.signal(SIGTERM);
    CHECK(proxy.wait() == 0);
  }
  SUBCASE("after a crash of the target") {
    // It dies alone and is started again.
    const auto pid = std::atol(get(proxy.port(), "/pid").body.c_str());
    kill_one(pid);
    CHECK(wait_for([&] { return get(proxy.port(), "/pid").status == 200; }));
    CHECK(wait_for(
        [&] { return children_in_group(static_cast<pid_t>(pid)).empty(); }));
    proxy.signal(SIGTERM);
    CHECK(proxy.wait() == 0);
  }
  CHECK(proxy.nothing_left());
}
