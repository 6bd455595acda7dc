// Restricted environments: an unprivileged user, no /proc, a read-only file
// system, no IPv4.

#include "restricted.hpp"

#include <net/if.h>
#include <sched.h>
#include <sys/ioctl.h>

using namespace support;

TEST_CASE("restricted: an unprivileged user") {
  const auto as = getuid() == 0 ? someone : std::string();
  if (!can(as + "true")) { return; }
  ForAnyUser files;
  Within proxy("exec " + as + "\"$@\"", files.served(), files / "warmproxy");
  if (getuid() == 0) { CHECK(proc_status(proxy.pid(), "Uid") == 54321); }
  serves(proxy);
}

TEST_CASE("restricted: below a directory that may not be searched") {
  if (getuid() != 0 || !can(someone + "true")) { return; }
  ForAnyUser files;
  TemporaryDirectory closed; // mode 0700
  const auto here = closed / "here";
  mkdir(here.c_str(), 0755);
  auto environment = files.served();
  environment["WARMPROXY_BINARY"] = "fake";
  environment["PATH"] = files.path() + ":/usr/sbin:/usr/bin:/sbin:/bin";
  Within proxy("cd '" + here + "' && exec " + someone + "\"$@\"", environment,
               files / "warmproxy");
  CHECK(get(proxy.port(), "/cwd").body == here + "\n");
  serves(proxy);
}

TEST_CASE("restricted: no /proc") {
  if (sanitized) { return; } // a sanitizer needs it
  const std::string hide = "mount -t tmpfs none /proc";
  if (!can("unshare -m sh -c '" + hide + "'")) { return; }
  Within proxy("exec unshare -m sh -c '" + hide + "; exec \"$@\"' sh \"$@\"",
               serve_fake());
  serves(proxy);
}

TEST_CASE("restricted: a read-only file system") {
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

TEST_CASE("restricted: IPv6 only") {
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
