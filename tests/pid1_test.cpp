// warmproxy as PID 1 of a container.

#include "restricted.hpp"

using namespace support;

TEST_CASE("PID 1: orphans are reaped") {
  const std::string alone = "unshare -p -f --kill-child ";
  if (!can(alone + "true")) { return; }
  auto environment = serve_fake();
  // The shell dies of SIGTERM, its child exits a little later.
  environment["WARMPROXY_BINARY"] = "/bin/sh";
  environment["WARMPROXY_ARGS"] =
      "-c '" + built("fake") + " --term-delay 50 & wait'";
  environment["WARMPROXY_IDLE_STOP"] = "20ms";
  // The rest of the group gets SIGTERM a tenth of it after the shell has ended.
  environment["WARMPROXY_STOP_TIMEOUT"] = "5s";
  environment["MARK"] = "first-" + std::to_string(getpid());
  Within proxy("exec " + alone + "\"$@\"", environment);
  const auto all = children_of(proxy.pid());
  REQUIRE(all.size() == 1);
  const auto first = all.front();
  for (int i = 0; i < 3; ++i) {
    CHECK(get(proxy.port(), "/pid").status == 200);
    CHECK(wait_for([&] {
      return get(proxy.port(), "/-/status").body.find("\"cold\"") !=
             std::string::npos;
    }));
  }
  std::size_t zombies = 0;
  if (auto *dir = opendir("/proc")) {
    while (auto *entry = readdir(dir)) {
      const auto pid = static_cast<pid_t>(std::atol(entry->d_name));
      if (pid > 0 && proc_status(pid, "PPid") == first &&
          read_file(proc_file(pid, "cmdline")).empty()) {
        ++zombies;
      }
    }
    closedir(dir);
  }
  CHECK(zombies == 0);
  kill(first, SIGTERM);
  CHECK(proxy.wait() == 0);
}
