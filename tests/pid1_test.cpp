// warmproxy as PID 1 of a container.

#include "restricted.hpp"

using namespace support;

namespace {

std::size_t zombies_of(pid_t parent) {
  std::size_t count = 0;
  auto *dir = opendir("/proc");
  if (!dir) { fail("/proc"); }
  while (auto *entry = readdir(dir)) {
    const auto pid = static_cast<pid_t>(std::atol(entry->d_name));
    if (pid > 0 && proc_status(pid, "PPid") == parent &&
        read_file(proc_file(pid, "cmdline")).empty()) {
      ++count;
    }
  }
  closedir(dir);
  return count;
}

} // namespace

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
  CHECK(zombies_of(first) == 0);
  kill(first, SIGTERM);
  CHECK(proxy.wait() == 0);
}

TEST_CASE("PID 1: orphans are reaped while the target runs") {
  const std::string alone = "unshare -p -f --kill-child ";
  if (!can(alone + "true")) { return; }
  TemporaryDirectory directory;
  auto environment = serve_fake();
  environment["WARMPROXY_BINARY"] = "/bin/sh";
  // Twenty processes whose parents end before them.
  environment["WARMPROXY_ARGS"] =
      "-c 'for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do "
      "((sleep 0.3; echo >>" +
      (directory / "orphans") + ")& ); done; exec " + built("fake") + "'";
  Within proxy("exec " + alone + "\"$@\"", environment);
  const auto all = children_of(proxy.pid());
  REQUIRE(all.size() == 1);
  const auto first = all.front();
  SUBCASE("") {}
  SUBCASE("though the watchdog process was killed") {
    const auto watchdog = children_of(first);
    REQUIRE(watchdog.size() == 1);
    kill(watchdog.front(), SIGKILL);
  }
  CHECK(get(proxy.port(), "/pid").status == 200);
  CHECK(wait_for(
      [&] { return lines_of(read_file(directory / "orphans")).size() == 20; }));
  CHECK(wait_for([&] { return zombies_of(first) == 0; }));
  // The status of the target is still known.
  get(proxy.port(), "/crash");
  CHECK(proxy.printed("exited with status 7"));
  CHECK(wait_for([&] { return get(proxy.port(), "/pid").status == 200; }));
  kill(first, SIGTERM);
  CHECK(proxy.wait() == 0);
}

TEST_CASE("PID 1: the whole group is told, whose ever /proc is mounted") {
  TemporaryDirectory directory;
  const auto signals = directory / "signals";
  std::string alone = "unshare -p -f --kill-child ";
  // There, the first processes that we start have numbers that nobody has.
  SUBCASE("of the namespace above") {}
  SUBCASE("of our own") { alone += "--mount-proc "; }
  if (!can(alone + "true")) { return; }
  auto environment = serve_fake();
  environment["WARMPROXY_BINARY"] = "/bin/sh";
  environment["WARMPROXY_ARGS"] =
      "-c '" + built("fake") + " --polite --term-file " + signals + " & wait'";
  environment["WARMPROXY_STOP_TIMEOUT"] = "10s";
  environment["MARK"] = "told-" + std::to_string(getpid());
  Within proxy("exec " + alone +
                   "sh -c '(echo 31000 >/proc/sys/kernel/ns_last_pid) "
                   "2>/dev/null; exec \"$@\"' sh \"$@\"",
               environment);
  const auto all = children_of(proxy.pid());
  REQUIRE(all.size() == 1);
  CHECK(get(proxy.port(), "/pid").status == 200);
  kill(all.front(), SIGTERM);
  CHECK(proxy.wait() == 0);
  CHECK(read_file(signals) == "SIGTERM\nexit\n");
  CHECK(wait_for(
      [&] { return processes_with("MARK=" + environment["MARK"]).empty(); }));
}

TEST_CASE("PID 1: a second signal ends it at once") {
  const std::string alone = "unshare -p -f --kill-child ";
  if (!can(alone + "true")) { return; }
  auto environment = serve_fake({"--ignore-term"});
  environment["WARMPROXY_STOP_TIMEOUT"] = "10m";
  environment["MARK"] = "second-" + std::to_string(getpid());
  Within proxy("exec " + alone + "\"$@\"", environment);
  const auto all = children_of(proxy.pid());
  REQUIRE(all.size() == 1);
  CHECK(get(proxy.port(), "/pid").status == 200);
  kill(all.front(), SIGTERM);
  CHECK(proxy.printed("stopping"));
  CHECK(wait_for([&] {
    kill(all.front(), SIGTERM);
    return !proxy.running();
  }));
  CHECK(wait_for(
      [&] { return processes_with("MARK=" + environment["MARK"]).empty(); }));
}

// As the README's container: the command is the entry point's, and the platform
// sets PORT.
TEST_CASE("PID 1: a container with a read-only root and its own network") {
  const std::string alone =
      "unshare -p -f -m -n --mount-proc --kill-child /bin/sh -c ";
  const std::string prepare =
      "ip link set lo up && mount -o remount,bind,ro / && ";
  if (!can(alone + "'" + prepare + "true'")) { return; }
  const Environment environment = {{"PATH", "/usr/sbin:/usr/bin:/sbin:/bin"},
                                   {"PORT", "8080"},
                                   {"WARMPROXY_TRUST_PROXY", "1"}};
  Process proxy("/bin/sh",
                {"-c",
                 "exec " + alone + "'" + prepare + "exec \"$@\"' sh \"$@\"",
                 "sh", built("warmproxy"), built("fake")},
                environment);
  REQUIRE(proxy.printed("listening on"));
  const auto all = children_of(proxy.pid());
  REQUIRE(all.size() == 1);
  const auto ask = [&](const std::string &target) {
    Process client("nsenter",
                   {"-t", std::to_string(all.front()), "-n", "bash", "-c",
                    "exec 3<>/dev/tcp/127.0.0.1/8080; printf 'GET " + target +
                        " HTTP/1.0\\r\\nX-Forwarded-Proto: https\\r\\n\\r\\n' "
                        ">&3; cat <&3"},
                   environment);
    client.wait();
    return client.out();
  };
  const auto echoed = ask("/echo");
  CHECK(echoed.find("HTTP/1.1 200") == 0);
  CHECK(echoed.find("X-Forwarded-Proto: https") != std::string::npos);
  ask("/crash");
  CHECK(wait_for([&] { return ask("/pid").find("HTTP/1.1 200") == 0; }));
  kill(all.front(), SIGTERM);
  CHECK(proxy.wait() == 0);
  CHECK_FALSE(proxy.printed("cannot be ended", Milliseconds(0)));
}
