// Little room: no rights, few descriptors, no /proc, nothing to write to, no
// IPv4, and what the kernel may refuse. Where the test itself may not arrange
// that, it says so and is skipped.

#include "figures.hpp"

#include <net/if.h>
#include <sched.h>
#include <sys/ioctl.h>

using namespace support;

namespace {

bool can(const std::string &command) {
  Process process("/bin/sh", {"-c", command},
                  {{"PATH", "/usr/sbin:/usr/bin:/sbin:/bin"}});
  if (process.wait() == 0) { return true; }
  MESSAGE("skipped, not possible here: ", command);
  return false;
}

// A user that owns nothing here.
const std::string someone = "setpriv --reuid=54321 --regid=54321 "
                            "--clear-groups --no-new-privs ";

// What was built, where any user can execute it.
struct ForAll : TemporaryDirectory {
  ForAll() {
    chmod(path().c_str(), 0755);
    for (const auto *name : {"warmproxy", "fake"}) {
      write_file(*this / name, read_file(built(name)));
      chmod((*this / name).c_str(), 0755);
    }
  }
  Environment served() const {
    auto environment = serve_fake();
    environment["WARMPROXY_BINARY"] = *this / "fake";
    return environment;
  }
};

// A soft limit, changed from outside by whoever may.
void limit(pid_t pid, const std::string &what, const std::string &as = "") {
  Process process(
      "/bin/sh",
      {"-c", as + "prlimit --pid " + std::to_string(pid) + " --" + what + ":"},
      {{"PATH", "/usr/sbin:/usr/bin:/sbin:/bin"}});
  if (process.wait() != 0) { throw Error("prlimit: " + process.err()); }
}

rlim_t hard_limit(pid_t pid, decltype(RLIMIT_NOFILE) what) {
  rlimit value{};
  prlimit(pid, what, nullptr, &value);
  return value.rlim_max;
}

// The number that the next descriptor of a process will have.
std::string next_fd(pid_t pid) {
  struct stat s;
  for (int fd = 0;; ++fd) {
    const auto number = std::to_string(fd);
    if (lstat((proc_file(pid, "fd/") + number).c_str(), &s) != 0) {
      return number;
    }
  }
}

// The first answer starts the target, a crash is recovered from, and the end is
// an end.
void serves(Within &proxy, const std::string &host = "127.0.0.1") {
  const auto ask = [&](const std::string &target) {
    return RawClient(proxy.port(), host).get(target);
  };
  CHECK(ask("/pid").status == 200);
  CHECK(ask("/bytes?n=1000000").body.size() == 1000000);
  ask("/crash");
  CHECK(wait_for([&] { return ask("/pid").status == 200; }));
  const auto target = std::atol(ask("/pid").body.c_str());
  CHECK(target > 0);
  proxy.signal(SIGTERM);
  CHECK(proxy.wait() == 0);
}

} // namespace

TEST_CASE("an unprivileged user") {
  const auto as = getuid() == 0 ? someone : std::string();
  if (!can(as + "true")) { return; }
  ForAll files;
  Within proxy("exec " + as + "\"$@\"", files.served(), files / "warmproxy");
  if (getuid() == 0) { CHECK(proc_status(proxy.pid(), "Uid") == 54321); }
  serves(proxy);
}

TEST_CASE("256 descriptors") {
  auto environment = serve_fake();
  environment["WARMPROXY_IDLE_STOP"] = "100ms";
  Within proxy("ulimit -n 256; exec \"$@\"", environment);
  CHECK(hard_limit(proxy.pid(), RLIMIT_NOFILE) == 256);
  // More than there is room for, each with a request under way.
  const std::string wait = "GET /slow?ms=500 HTTP/1.1\r\nHost: test\r\n\r\n";
  CHECK(get(proxy.port(), "/pid").status == 200);
  const auto calm = open_fds(proxy.pid());
  std::size_t good = 0, told = 0;
  std::list<RawClient> clients;
  for (int i = 0; i < 300; ++i) {
    clients.emplace_back(proxy.port());
    clients.back().send(wait);
  }
  for (auto &client : clients) {
    const auto response = client.read_response();
    CHECK(response.complete);
    if (response.status == 200) { ++good; }
    if (response.status == 503) {
      ++told;
      CHECK(response.header("Retry-After") != "");
    }
    client.close(); // who is answered makes room
  }
  MESSAGE(good, " answered, ", told, " told to come back");
  CHECK(good + told == 300);
  CHECK(good >= 80);
  CHECK(told >= 1);
  CHECK(wait_for([&] { return open_fds(proxy.pid()) <= calm; }));
  serves(proxy);
}

TEST_CASE("connections that are kept take no one's descriptor") {
  Within proxy("ulimit -n 256; exec \"$@\"", serve_fake());
  std::list<RawClient> clients;
  const std::string get = "GET /pid HTTP/1.1\r\nHost: test\r\n\r\n";
  const std::string post = "POST /slow?ms=300 HTTP/1.1\r\nHost: test\r\n"
                           "Content-Length: 0\r\n\r\n";
  const auto all = [&](const std::string &request) {
    for (auto &client : clients) {
      client.send(request);
    }
    int good = 0;
    for (auto &client : clients) {
      good += client.read_response().status == 200;
    }
    return good;
  };
  for (int i = 0; i < 100; ++i) {
    clients.emplace_back(proxy.port());
  }
  CHECK(all(get) == 100);
  // So long that a POST must not ride on what was kept.
  for (int i = 0; i < 3; ++i) {
    CHECK(rests(proxy.pid()));
  }
  CHECK(all(post) == 100);
}

TEST_CASE("no /proc") {
  if (sanitized) { return; } // a sanitizer needs it
  const std::string hide = "mount -t tmpfs none /proc";
  if (!can("unshare -m sh -c '" + hide + "'")) { return; }
  Within proxy("exec unshare -m sh -c '" + hide + "; exec \"$@\"' sh \"$@\"",
               serve_fake());
  serves(proxy);
}

TEST_CASE("a read-only file system") {
  // All of them, and nobody can write, not even root.
  const std::string freeze =
      "for place in $(cut -d\" \" -f2 /proc/self/mounts); do "
      "mount -o remount,ro,bind \"$place\" 2>/dev/null; done; "
      "! true 2>/dev/null >/tmp/warmproxy-test-$$";
  if (!can("unshare -m sh -c '" + freeze + "'")) { return; }
  Within proxy("exec unshare -m sh -c '" + freeze +
                   " || exit 9; exec \"$@\"' " + "sh \"$@\"",
               serve_fake());
  CHECK(get(proxy.port(), "/write?/tmp/warmproxy-test").status == 500);
  serves(proxy);
}

TEST_CASE("IPv6 only") {
  // Of this thread alone, and of what it starts.
  std::string skipped;
  std::thread([&] {
    if (unshare(CLONE_NEWNET) != 0) {
      skipped = "no network namespace of our own";
      return;
    }
    ifreq loopback{};
    std::strcpy(loopback.ifr_name, "lo");
    const int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    loopback.ifr_flags = IFF_UP;
    bool ready = ioctl(fd, SIOCSIFFLAGS, &loopback) == 0;
    auto &address = reinterpret_cast<sockaddr_in &>(loopback.ifr_addr);
    address = {};
    address.sin_family = AF_INET; // 0.0.0.0: none
    ready = ready && ioctl(fd, SIOCSIFADDR, &loopback) == 0;
    close(fd);
    if (!ready) {
      skipped = "lo cannot be set up";
      return;
    }
    try {
      close(connect_to("127.0.0.1", 1));
    } catch (const Error &error) {
      CHECK(std::string(error.what()).find("unreachable") != std::string::npos);
    }
    try {
      auto environment = serve_fake({"--host", "::1"});
      for (const std::string host : {"::1", "::"}) {
        environment["HOST"] = host;
        environment["PORT"] = "3000"; // the network is our own
        Process proxy(built("warmproxy"), {}, environment);
        CHECK(proxy.printed("listening"));
        RawClient client(3000, "::1");
        CHECK(client.get("/pid").status == 200);
        CHECK(client.post("/echo", "x").body.find("X-Forwarded-For: ::1\r\n") !=
              std::string::npos);
        proxy.signal(SIGTERM);
        CHECK(proxy.wait() == 0);
      }
    } catch (const std::exception &error) {
      CHECK(std::string(error.what()) == "");
    }
  }).join();
  if (skipped != "") { MESSAGE("skipped: ", skipped); }
}

TEST_CASE("no descriptor left for a connection") {
  ServeProcess proxy(serve_fake());
  RawClient inside(proxy.port());
  CHECK(inside.get("/pid").status == 200);
  const auto most = std::to_string(hard_limit(proxy.pid(), RLIMIT_NOFILE));
  limit(proxy.pid(), "nofile=" + next_fd(proxy.pid()));
  RawClient outside(proxy.port());
  outside.send("GET /pid HTTP/1.1\r\nHost: test\r\n\r\n");
  CHECK(rests(proxy.pid()));
  CHECK(!outside.readable());
  // Who is there already is served.
  CHECK(inside.get("/pid").status == 200);
  SUBCASE("then there is, since the limit is raised") {
    limit(proxy.pid(), "nofile=" + most);
  }
  SUBCASE("then there is, since somebody has gone") {
    if (sanitized) { return; } // UBSan needs one, to look whether it may look
    inside.close();
  }
  CHECK(outside.read_response().status == 200);
}

TEST_CASE("no descriptor left for the target") {
#ifndef __linux__
  return; // poll(2) takes no more descriptors than may be open
#endif
  Watched proxy(serve_fake());
  RawClient client(proxy.port());
  CHECK(client.get("/pid").status == 200);
  // Every kept connection is in use, whichever of our threads has it.
  std::list<RawClient> slow;
  for (int i = 0; i < 8; ++i) {
    slow.emplace_back(proxy.port());
    slow.back().send("GET /slow?ms=600000 HTTP/1.1\r\nHost: test\r\n\r\n");
  }
  CHECK(wait_for([&] { return proxy.number("in_flight") == 8; }));
  const auto most = std::to_string(hard_limit(proxy.pid(), RLIMIT_NOFILE));
  limit(proxy.pid(), "nofile=3");
  const auto response = client.get("/pid");
  CHECK(response.status == 503);
  CHECK(response.body == "warmproxy: no connection to the target: "
                         "Too many open files\n");
  CHECK(response.header("Retry-After") != "");
  CHECK(rests(proxy.pid()));
  limit(proxy.pid(), "nofile=" + most);
  CHECK(client.get("/pid").status == 200);
  CHECK(proxy.number("starts") == 1);
}

TEST_CASE("no process left for the target, and no thread for a connection") {
  const auto as = getuid() == 0 ? someone : std::string();
  if (!can(as + "true")) { return; }
  ForAll files;
  Within proxy("exec " + as + "\"$@\"", files.served(), files / "warmproxy");
  RawClient inside(proxy.port());
  CHECK(inside.get("/-/status").status == 200);
  // Root may do anything; everybody else has at least this process.
  limit(proxy.pid(), "nproc=1", as);

  const auto response = inside.get("/pid");
  CHECK(response.status == 502);
  CHECK(response.body.find("cannot be started: Resource temporarily") !=
        std::string::npos);

  RawClient outside(proxy.port());
  outside.send("GET /pid HTTP/1.1\r\nHost: test\r\n\r\n");
  CHECK(outside.read_response().status == 503);
  CHECK(rests(proxy.pid()));

  limit(proxy.pid(), "nproc=10000", as);
  CHECK(wait_for([&] { return inside.get("/pid").status == 200; }));
  serves(proxy);
}

TEST_CASE("the first process of a container reaps what it inherits") {
  const std::string alone = "unshare -p -f --kill-child ";
  if (!can(alone + "true")) { return; }
  auto environment = serve_fake();
  // The shell ends with SIGTERM at once, what it has started a little later.
  environment["WARMPROXY_BINARY"] = "/bin/sh";
  environment["WARMPROXY_ARGS"] =
      "-c '" + built("fake") + " --term-delay 50 & wait'";
  environment["WARMPROXY_IDLE_STOP"] = "20ms";
  // Longer than the test: nothing may wait for it.
  environment["WARMPROXY_STOP_TIMEOUT"] = "10m";
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
