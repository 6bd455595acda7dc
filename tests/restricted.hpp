// Restricted environments. Where a test may not arrange one, it says so and is
// skipped.

#ifndef WARMPROXY_TESTS_RESTRICTED_HPP
#define WARMPROXY_TESTS_RESTRICTED_HPP

#include "figures.hpp"

namespace support {

inline bool can(const std::string &command) {
  Process process("/bin/sh", {"-c", command},
                  {{"PATH", "/usr/sbin:/usr/bin:/sbin:/bin"}});
  if (process.wait() == 0) { return true; }
  MESSAGE("skipped, not possible here: ", command);
  return false;
}

// Runs a command as a user that owns no files here.
inline const std::string someone = "setpriv --reuid=54321 --regid=54321 "
                                   "--clear-groups --no-new-privs ";

// The built programs, where any user can execute them.
struct ForAnyUser : TemporaryDirectory {
  ForAnyUser() {
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

// Sets a soft limit of a process.
inline void limit(pid_t pid, const std::string &what,
                  const std::string &as = "") {
  Process process(
      "/bin/sh",
      {"-c", as + "prlimit --pid " + std::to_string(pid) + " --" + what + ":"},
      {{"PATH", "/usr/sbin:/usr/bin:/sbin:/bin"}});
  if (process.wait() != 0) { throw Error("prlimit: " + process.err()); }
}

inline rlim_t hard_limit(pid_t pid, decltype(RLIMIT_NOFILE) what) {
  rlimit value{};
  prlimit(pid, what, nullptr, &value);
  return value.rlim_max;
}

// The number that the next descriptor of a process will have.
inline std::string next_fd(pid_t pid) {
  struct stat s;
  for (int fd = 0;; ++fd) {
    const auto number = std::to_string(fd);
    if (lstat((proc_file(pid, "fd/") + number).c_str(), &s) != 0) {
      return number;
    }
  }
}

// Checks that the proxy starts the target, recovers from a crash and stops.
inline void serves(Within &proxy, const std::string &host = "127.0.0.1") {
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

} // namespace support

#endif
