// The program's process without a proxy: where it is found, its scratch copy,
// how it is started, what it listens on, and its end.

#include "support.hpp"

#include <doctest/doctest.h>

#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/utsname.h>

using namespace support;
using namespace warmproxy::detail;

namespace {

// A Config whose log is kept.
struct LoggedConfig {
  LoggedConfig() {
    config.binary = "sh";
    config.log = [this](std::string_view line) {
      const std::lock_guard<std::mutex> lock(mutex);
      lines.append(line).append("\n");
    };
  }
  bool logged(std::string_view text) {
    const std::lock_guard<std::mutex> lock(mutex);
    return contains(lines, text);
  }

  Config config;
  std::mutex mutex;
  std::string lines;
};

// A directory to run a program in, and a place for its copies.
struct Site : LoggedConfig {
  Site() {
    mkdir(app.c_str(), 0755);
    write_program("server", "#!/bin/sh\nexit 0\n");
    config.binary = "./server";
    config.directory = app;
    config.scratch = scratch;
  }

  void write_program(const std::string &name, std::string_view text) const {
    write_file(app + "/" + name, text);
    chmod((app + "/" + name).c_str(), 0755);
  }

  // What a start would run; a reason is thrown.
  Program prepare(const std::function<void()> &check = [] {}) {
    const Log log(config);
    const auto before = std::filesystem::current_path();
    std::filesystem::current_path(app);
    struct Return {
      const std::filesystem::path &path;
      ~Return() { std::filesystem::current_path(path); }
    } return_to{before};
    return prepare_program(config, log, check);
  }
  std::string copy() { return prepare().directory; }
  std::string refusal() {
    try {
      return "made " + copy();
    } catch (const std::exception &error) { return error.what(); }
  }
  std::size_t count(std::string_view prefix = "") const {
    std::size_t n = 0;
    for (const auto &entry : std::filesystem::directory_iterator(scratch)) {
      n += starts_with(entry.path().filename().string(), prefix);
    }
    return n;
  }

  TemporaryDirectory directory;
  const std::string app = directory / "app", scratch = directory / "scratch";
};

struct stat status_of(const std::string &path) {
  struct stat status {};
  if (lstat(path.c_str(), &status) != 0) { fail(path); }
  return status;
}
unsigned mode_of(const std::string &path) {
  return status_of(path).st_mode & 07777;
}
std::string link_of(const std::string &path) {
  return std::filesystem::read_symlink(path).string();
}

// Runs `function` in a child process, with another user id where one is given.
// Returns its exit status; an exception is 100.
template <class F> pid_t fork_and_run(F function, uid_t user = 0) {
  const pid_t pid = fork();
  if (pid != 0) { return pid; }
  int status = 100;
  try {
    if (user == 0 || (setgid(user) == 0 && setuid(user) == 0)) {
      status = function();
    }
  } catch (...) {}
  _exit(status);
}
int status_of_child(pid_t pid) {
  int status = 0;
  while (waitpid(pid, &status, 0) < 0 && errno == EINTR) {}
  return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

bool is_root() {
  if (getuid() == 0) { return true; }
  MESSAGE("skipped: needs root");
  return false;
}

// Starts the program. Returns the reason why it cannot be started, or "".
std::string try_to_start(
    warmproxy::detail::Process &process, int port = 1234,
    const std::function<void()> &check = [] {}) {
  try {
    process.start(port, check);
    return "";
  } catch (const std::exception &reason) { return reason.what(); }
}

// The process under test, which is started and stopped in one thread.
struct Run : LoggedConfig {
  explicit Run(std::string script = "") {
    signal(SIGPIPE, SIG_IGN); // as cpp-httplib does
    config.args = {"-c", std::move(script)};
  }
  ~Run() { process.stop(SteadyClock::now()); }

  std::string start(int port = 1234) { return try_to_start(process, port); }
  bool exits() {
    return support::wait_for([this] { return process.exited(); });
  }
  void stop(Milliseconds budget = patience) {
    process.stop(SteadyClock::now() + budget);
  }

  TemporaryDirectory directory;
  Log log{config};
  warmproxy::detail::Process process{config, log};
};

// What a shell script prints that runs as the target.
std::string output(const std::function<void(Config &)> &change,
                   const std::string &script) {
  Run run;
  const auto file = run.directory / "out";
  run.config.args = {"-c", "{ " + script + "\n} > " + file + " 2>&1", "name"};
  change(run.config);
  if (const auto error = run.start(); !error.empty()) { return error; }
  run.exits();
  run.stop();
  return read_file(file);
}
std::string output(const std::string &script) {
  return output([](Config &) {}, script);
}

// The absolute path of a program; "" if it is seen that it cannot be executed.
std::string find_binary(const std::string &name) {
  try {
    return absolute_path(find_program(name));
  } catch (const std::runtime_error &) { return ""; }
}

// Why it cannot be executed; "" if nothing is seen to be wrong.
std::string explain_unrunnable(const std::string &name) {
  try {
    find_program(name);
    return "";
  } catch (const std::runtime_error &reason) { return reason.what(); }
}

struct Variable {
  Variable(const char *variable, const char *value) : name(variable) {
    if (const char *old = getenv(name)) { before = old; }
    value ? setenv(name, value, 1) : unsetenv(name);
  }
  ~Variable() { before ? setenv(name, before->c_str(), 1) : unsetenv(name); }
  const char *name;
  std::optional<std::string> before;
};

} // namespace

// ---- The scratch copy

TEST_CASE("scratch: one whole copy, which a second start finds") {
  Site site;
  mkdir((site.app + "/data").c_str(), 0755);
  write_file(site.app + "/data/x", std::string(200000, 'x'));
  write_file(site.app + "/empty", "");
  const auto program = site.prepare();
  CHECK(program.argv0 == "./server");
  CHECK(program.path == program.directory + "/server");
  CHECK(starts_with(program.directory, site.scratch + "/"));
  CHECK(read_file(program.directory + "/data/x") == std::string(200000, 'x'));
  CHECK(site.logged("copied " + site.app));
  write_file(program.directory + "/data/x", "written by the program");
  site.lines.clear();
  CHECK(site.copy() == program.directory);
  CHECK(site.lines.empty());
  CHECK(read_file(program.directory + "/data/x") == "written by the program");
  CHECK(site.count() == 1);
}

TEST_CASE("scratch: only its owner can read it") {
  Site site;
  site.config.scratch = site.scratch + "/a/b";
  const auto old = umask(0);
  const auto copy = site.copy();
  umask(old);
  CHECK(mode_of(copy) == 0700);
  CHECK(mode_of(site.scratch) == 0700);
  CHECK(mode_of(site.scratch + "/a/b") == 0700);
}

TEST_CASE("scratch: modes, times and links are kept") {
  Site site;
  mkdir((site.app + "/sub").c_str(), 0750);
  write_file(site.app + "/sub/file", "text");
  chmod((site.app + "/sub/file").c_str(), 0640);
  symlink("file", (site.app + "/sub/link").c_str());
  symlink("nowhere", (site.app + "/dangling").c_str());
  const timespec times[] = {{1000, 5}, {2000, 7}};
  for (const auto name : {"/sub/file", "/sub/link", "/sub"}) {
    utimensat(AT_FDCWD, (site.app + name).c_str(), times, AT_SYMLINK_NOFOLLOW);
  }
  const auto copy = site.copy();
  CHECK(mode_of(copy + "/sub") == 0750);
  CHECK(mode_of(copy + "/sub/file") == 0640);
  CHECK(mode_of(copy + "/server") == 0755);
  CHECK(link_of(copy + "/sub/link") == "file");
  CHECK(link_of(copy + "/dangling") == "nowhere");
  for (const auto name : {"/sub/file", "/sub/link", "/sub"}) {
    CHECK(status_of(copy + name).st_mtim.tv_sec == 2000);
    CHECK(status_of(copy + name).st_mtim.tv_nsec == 7);
  }
}

TEST_CASE("scratch: set-user-ID is kept for the same owner only") {
  Site site;
  site.write_program("own", "");
  chmod((site.app + "/own").c_str(), 04755);
  CHECK(mode_of(site.copy() + "/own") == 04755);
  if (!is_root()) { return; }
  site.write_program("other", "");
  if (chown((site.app + "/other").c_str(), 12345, 12345)) { fail("chown"); }
  chmod((site.app + "/other").c_str(), 06755);
  CHECK(mode_of(site.copy() + "/other") == 0755);
}

TEST_CASE("scratch: sparse files stay sparse") {
  Site site;
  const off_t size = 1 << 30;
  const std::map<off_t, std::string> data = {{size / 2, "in the middle"},
                                             {size - 7, "the end"}};
  const auto from = site.app + "/sparse";
  int fd = open(from.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
  REQUIRE(ftruncate(fd, size) == 0);
  for (const auto &[at, text] : data) {
    REQUIRE(pwrite(fd, text.data(), text.size(), at) > 0);
  }
  const auto next = lseek(fd, 0, SEEK_DATA);
  close(fd);
  const auto is_sparse = [](const std::string &path) {
    return status_of(path).st_blocks < (10 << 20) / 512;
  };
  if (!is_sparse(from) || next == 0) {
    MESSAGE("skipped: no sparse files here");
    return;
  }
  const auto copy = site.copy() + "/sparse";
  CHECK(is_sparse(copy));
  CHECK(status_of(copy).st_size == size);
  fd = open(copy.c_str(), O_RDONLY | O_CLOEXEC);
  for (const auto &[at, text] : data) {
    std::string around(100 + text.size(), 'x');
    CHECK(pread(fd, &around[0], around.size(), at - 100) ==
          static_cast<ssize_t>(around.size()));
    CHECK(around == std::string(100, '\0') + text);
  }
  close(fd);
}

TEST_CASE("scratch: a read-only release has a writable copy") {
  Site site;
  mkdir((site.app + "/sub").c_str(), 0755);
  write_file(site.app + "/sub/file", "text");
  chmod((site.app + "/sub/file").c_str(), 0444);
  chmod((site.app + "/sub").c_str(), 0555);
  const auto copy = site.copy();
  CHECK(mode_of(copy + "/sub/file") == 0644);
  CHECK(mode_of(copy + "/sub") == 0755);
  chmod((site.app + "/sub").c_str(), 0755);
}

TEST_CASE("scratch: each change of a release makes another copy") {
  Site site;
  write_file(site.app + "/thing", "1");
  auto last = site.copy();
  const auto changes = [&](const char *what) {
    INFO(what);
    const auto next = site.copy();
    CHECK(next != last);
    CHECK(site.logged("an earlier scratch copy is left where it is: " + last));
    last = next;
  };
  write_file(site.app + "/thing", "2");
  const timespec old[] = {{1000, 0}, {1000, 0}};
  utimensat(AT_FDCWD, (site.app + "/thing").c_str(), old, 0);
  changes("the same size and an older date");
  CHECK(read_file(last + "/thing") == "2");

  unlink((site.app + "/thing").c_str());
  mkdir((site.app + "/thing").c_str(), 0755);
  write_file(site.app + "/thing/inside", "3");
  changes("a file that became a folder");
  CHECK(read_file(last + "/thing/inside") == "3");

  unlink((site.app + "/thing/inside").c_str());
  rmdir((site.app + "/thing").c_str());
  write_file(site.app + "/thing", "4");
  changes("a folder that became a file");
  CHECK(read_file(last + "/thing") == "4");

  chmod((site.app + "/thing").c_str(), 0600);
  changes("a mode");
  rename((site.app + "/thing").c_str(), (site.app + "/other").c_str());
  changes("a name");
  unlink((site.app + "/other").c_str());
  changes("a file less");
}

TEST_CASE("scratch: two empty directories have different copies") {
  Site site;
  site.config.binary = "sh";
  std::set<std::string> copies;
  for (const auto name : {"one", "two"}) {
    site.config.directory = site.directory / name;
    std::filesystem::create_directory(site.config.directory);
    copies.insert(site.copy());
  }
  CHECK(copies.size() == 2);
}

TEST_CASE("scratch: a rollback finds the earlier copy") {
  Site site;
  const auto other = site.directory / "other";
  std::filesystem::create_directory(other);
  write_file(other + "/new", "");
  const auto first = site.copy();
  write_file(first + "/rows", "written");
  site.config.directory = other;
  site.config.binary = "sh";
  CHECK(site.copy() != first);
  site.config.directory = site.app;
  CHECK(site.copy() == first);
  CHECK(read_file(first + "/rows") == "written");
}

TEST_CASE("scratch: earlier copies, and nothing else, are named in the log") {
  Site site;
  const auto first = site.copy();
  const auto other = site.scratch + "/sixteen-letters!"; // as long as theirs
  std::filesystem::create_directory(other);
  write_file(site.app + "/new", "");
  CHECK(site.copy() != first);
  const std::string line = "an earlier scratch copy is left where it is: ";
  CHECK(site.logged(line + first));
  CHECK_FALSE(site.logged(line + other));
}

TEST_CASE("scratch: a link that became a file leaves its target alone") {
  Site site;
  const auto outside = site.directory / "outside";
  write_file(outside, "precious");
  symlink("../outside", (site.app + "/link").c_str());
  const auto first = site.copy();
  CHECK(read_file(first + "/link") == "precious");
  unlink((site.app + "/link").c_str());
  write_file(site.app + "/link", "new");
  const auto second = site.copy();
  CHECK(read_file(second + "/link") == "new");
  CHECK(read_file(outside) == "precious");
}

TEST_CASE("scratch: a relative link that leads out is made absolute") {
  Site site;
  write_file(site.directory / "outside", "o");
  std::filesystem::create_directories(site.app + "/a/deep/er");
  write_file(site.app + "/a/inside", "i");
  symlink("../../outside", (site.app + "/a/out").c_str());
  symlink("../a/inside", (site.app + "/a/in").c_str());
  symlink("../a/./inside", (site.app + "/a/deep/in").c_str());
  symlink("deep/er", (site.app + "/a/short").c_str());
  symlink("../..", (site.app + "/a/above").c_str());
  symlink("../..", (site.app + "/a/deep/root").c_str());
  // As text, this leads out; the kernel resolves `short` first.
  symlink("a/short/../../inside", (site.app + "/through").c_str());
  symlink("/etc/passwd", (site.app + "/absolute").c_str());
  const auto name = std::filesystem::path(site.app).filename().string();
  symlink(("../" + name + "/a/inside").c_str(), (site.app + "/again").c_str());
  const auto copy = site.copy();
  CHECK(link_of(copy + "/a/out") == site.app + "/a/../../outside");
  CHECK(read_file(copy + "/a/out") == "o");
  CHECK(link_of(copy + "/a/above") == site.app + "/a/../..");
  CHECK(link_of(copy + "/a/deep/root") == "../..");
  CHECK(link_of(copy + "/a/in") == "../a/inside");
  CHECK(link_of(copy + "/a/deep/in") == "../a/./inside");
  CHECK(link_of(copy + "/through") == "a/short/../../inside");
  CHECK(link_of(copy + "/absolute") == "/etc/passwd");
  CHECK(link_of(copy + "/again") == "a/inside");
}

TEST_CASE("scratch: a directory reached through a link") {
  Site site;
  const auto link = site.directory / "current";
  symlink("app", link.c_str());
  site.config.directory = link;
  for (const auto &binary : {std::string("./server"), link + "/server",
                             link + "/../app/server", site.app + "/server"}) {
    INFO(binary);
    site.config.binary = binary;
    const auto program = site.prepare();
    CHECK(program.path == program.directory + "/server");
    CHECK(program.argv0 == "./server");
  }
}

TEST_CASE("scratch: below the directory it is left out") {
  Site site;
  std::filesystem::create_directory(site.app + "/var");
  site.config.scratch = site.app + "/var/scratch";
  const auto copy = site.copy();
  CHECK(std::filesystem::exists(copy + "/var"));
  CHECK_FALSE(std::filesystem::exists(copy + "/var/scratch"));
  CHECK(site.copy() == copy);
  site.config.scratch = site.app;
  CHECK(contains(site.refusal(), "is the directory that is to be copied"));
}

// NFS refuses the lock of a folder, since that cannot be opened for writing.
TEST_CASE("scratch: where a folder cannot be locked") {
  Site site;
  std::string made;
  std::thread([&] { // of which alone flock(2) fails
    sock_filter program[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_flock, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EBADF),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)};
    const sock_fprog filter{4, program};
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
    if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter) == 0) {
      made = site.refusal();
    }
  })
      .join();
  if (made.empty()) {
    MESSAGE("skipped: no seccomp");
    return;
  }
  CHECK(made == "made " + site.copy());
  CHECK(site.count() == 1);
}

TEST_CASE("scratch: a full disk is named, and nothing is left of the copy") {
  if (!is_root()) { return; }
  Site site;
  mkdir(site.scratch.c_str(), 0700);
  if (mount("none", site.scratch.c_str(), "tmpfs", 0, "size=4m,mode=700")) {
    MESSAGE("skipped: no tmpfs can be mounted");
    return;
  }
  for (const auto name : {"/1", "/2", "/3"}) {
    write_file(site.app + name, std::string(2000000, 'x'));
  }
  const auto refusal = site.refusal();
  CHECK(starts_with(refusal, site.scratch + "/"));
  CHECK(contains(refusal, "No space left on device"));
  CHECK(site.count() == 0);
  unlink((site.app + "/3").c_str());
  CHECK(read_file(site.copy() + "/2").size() == 2000000);
  umount(site.scratch.c_str());
}

TEST_CASE("scratch: who may have touched it") {
  Site site;
  mkdir(site.scratch.c_str(), 0700);
  SUBCASE("anybody") {
    chmod(site.scratch.c_str(), 0777);
    CHECK(contains(site.refusal(), "any user may write to it"));
  }
  SUBCASE("a group, as Kubernetes has it") {
    chmod(site.scratch.c_str(), 02775);
    CHECK(contains(site.refusal(), "made "));
  }
  SUBCASE("anybody, with the sticky bit") {
    chmod(site.scratch.c_str(), 01777);
    CHECK(contains(site.refusal(), "made "));
  }
  SUBCASE("another user, who owns it") {
    if (!is_root()) { return; }
    if (chown(site.scratch.c_str(), 12345, 12345)) { fail("chown"); }
    CHECK(contains(site.refusal(), "belongs to another user"));
  }
  SUBCASE("another user, who made the copy") {
    if (!is_root()) { return; }
    const auto copy = site.copy();
    if (chown(copy.c_str(), 12345, 12345)) { fail("chown"); }
    CHECK(contains(site.refusal(), copy + ": not a folder of ours"));
  }
  SUBCASE("a file in place of the copy") {
    const auto copy = site.copy();
    std::filesystem::remove_all(copy);
    write_file(copy, "");
    CHECK(contains(site.refusal(), copy + ": not a folder of ours"));
  }
  SUBCASE("a file in place of the scratch folder") {
    rmdir(site.scratch.c_str());
    write_file(site.scratch, "");
    CHECK(contains(site.refusal(), ": Not a directory"));
  }
}

TEST_CASE("scratch: what cannot be read is left out, with a line") {
  Site site;
  std::filesystem::create_directories(site.app + "/secret/inside");
  write_file(site.app + "/private", "");
  write_file(site.app + "/public", "p");
  mkfifo((site.app + "/fifo").c_str(), 0644);
  chmod((site.app + "/secret").c_str(), 0);
  chmod((site.app + "/private").c_str(), 0);
  const auto try_it = [&] {
    const auto copy = site.copy();
    const bool good = read_file(copy + "/public") == "p" &&
                      std::filesystem::is_directory(copy + "/secret") &&
                      !std::filesystem::exists(copy + "/private") &&
                      !std::filesystem::exists(copy + "/fifo");
    return good && site.logged("/secret/: Permission denied") &&
                   site.logged("/private: Permission denied")
               ? 0
               : 1;
  };
  chmod(site.directory.path().c_str(), 0777 | S_ISVTX);
  // root reads everything
  const uid_t user = getuid() == 0 ? 65534 : 0;
  CHECK(status_of_child(fork_and_run(try_it, user)) == 0);
  chmod((site.app + "/secret").c_str(), 0755);
}

TEST_CASE("scratch: the copy can be interrupted") {
  Site site;
  for (int i = 0; i < 20; ++i) {
    write_file(site.app + "/" + std::to_string(i), "x");
  }
  int calls = 0, all = 0;
  site.prepare([&] { ++all; });
  std::filesystem::remove_all(site.scratch);
  for (const int limit : {1, all / 2, all - 1}) {
    calls = 0;
    CHECK_THROWS_WITH(site.prepare([&] {
      if (++calls == limit) { throw std::runtime_error("enough"); }
    }),
                      "enough");
    CHECK(site.count() == 0);
  }
}

TEST_CASE("scratch: a start is cancelled") {
  Site site;
  signal(SIGPIPE, SIG_IGN);
  site.config.binary = "/bin/sh";
  const Log log(site.config);
  warmproxy::detail::Process process(site.config, log);
  CHECK(try_to_start(process, 1, [] { fail_start("enough"); }) == "enough");
  CHECK_FALSE(process.started());
}

TEST_CASE("scratch: unfinished copies of dead processes are removed") {
  Site site;
  int ready[2];
  if (pipe(ready)) { fail("pipe"); }
  const auto copy_until_killed = [&] {
    int calls = 0;
    site.prepare([&] {
      if (site.count(".unfinished-") == 0 || ++calls > 1) { return; }
      if (write(ready[1], "", 1)) {}
      pause();
    });
    return 0;
  };
  mkdir(site.scratch.c_str(), 0700);
  const auto pid = fork_and_run(copy_until_killed);
  char byte = 0;
  CHECK(read(ready[0], &byte, 1) == 1);
  site.copy(); // it lives
  CHECK(site.count(".unfinished-") == 1);
  kill(pid, SIGKILL);
  CHECK(status_of_child(pid) == -SIGKILL);
  write_file(site.app + "/new", "");
  site.copy();
  CHECK(site.count(".unfinished-") == 0);
  CHECK(site.logged("removed the unfinished scratch copy"));
  close(ready[0]);
  close(ready[1]);
}

TEST_CASE("scratch: several processes at once make one copy") {
  Site site;
  for (int i = 0; i < 50; ++i) {
    write_file(site.app + "/" + std::to_string(i), std::string(10000, 'x'));
  }
  std::vector<pid_t> pids;
  for (int i = 0; i < 4; ++i) {
    pids.push_back(fork_and_run([&] {
      const auto copy = site.copy();
      for (int file = 0; file < 50; ++file) {
        if (read_file(copy + "/" + std::to_string(file)).size() != 10000) {
          return 1;
        }
      }
      return 0;
    }));
  }
  for (const auto pid : pids) {
    CHECK(status_of_child(pid) == 0);
  }
  CHECK(site.count() == 1);
}

// ---- Finding the program

TEST_CASE("binary: the path is the kernel's, and the last name stays") {
  Site site;
  std::filesystem::create_directories(site.directory / "far/away");
  symlink("far/away", (site.directory / "link").c_str());
  std::filesystem::copy(site.app + "/server", site.directory / "far/server");
  CHECK(find_binary(site.directory / "link/../server") ==
        site.directory / "far/server");
  symlink("server", (site.app + "/applet").c_str());
  CHECK(find_binary(site.app + "/applet") == site.app + "/applet");
  CHECK(find_binary(site.app + "/.//server") == site.app + "/server");
  CHECK(find_binary(site.app) == "");
  CHECK(find_binary(site.app + "/server/") == "");
  CHECK(find_binary("") == "");
  write_file(site.app + "/text", "");
  CHECK(find_binary(site.app + "/text") == "");
}

TEST_CASE("binary: an empty part of PATH is the current directory") {
  Site site;
  const auto before = std::filesystem::current_path();
  for (const auto path : {"/nonsuch:", ":/nonsuch", "/nonsuch::/nonsuch2"}) {
    const Variable variable("PATH", path);
    std::filesystem::current_path(site.app);
    CHECK(find_binary("server") == site.app + "/server");
    CHECK(find_binary("nonsuch") == "");
    std::filesystem::current_path(before);
  }
  const Variable variable("PATH", nullptr);
  CHECK(ends_with(find_binary("sh"), "/bin/sh"));
}

TEST_CASE("exec errors: each is explained") {
  Site site;
  const auto explain = [&](const std::string &text) {
    site.write_program("x", text);
    return explain_unrunnable(site.app + "/x");
  };
  const auto x = site.app + "/x: ";
  CHECK(explain("#!/bin/sh\n") == "");
  CHECK(explain("#! /bin/sh -e\n") == "");
  CHECK(explain_unrunnable("sh") == "");
  CHECK(explain("#!/usr/bin/nonsuch\n") ==
        x + "its interpreter /usr/bin/nonsuch does not exist");
  CHECK(explain("#!/usr/bin/nonsuch -x") ==
        x + "its interpreter /usr/bin/nonsuch does not exist");
  CHECK(contains(explain("#!/bin/sh\r\nexit\r\n"), "carriage return"));
  CHECK(contains(explain("#!/usr/bin/env node\r\n"), "carriage return"));
  CHECK(contains(explain("#!/bin/sh -e\r\n"), "carriage return"));
  CHECK(explain("#!nonsuch\n") == ""); // it depends on the directory
  CHECK(explain_unrunnable(site.app) == site.app + ": not a regular file");
  chmod((site.app + "/x").c_str(), 0644);
  CHECK(contains(explain_unrunnable(site.app + "/x"), "not executable"));
  symlink("nowhere", (site.app + "/link").c_str());
  CHECK(explain_unrunnable(site.app + "/link") ==
        site.app + "/link: No such file or directory");
  CHECK(explain_unrunnable("/nonsuch/x") == "/nonsuch/x: no such file");
  CHECK(explain_unrunnable("./nonsuch") == "./nonsuch: no such file");
  CHECK(explain_unrunnable("nonsuch-x") == "nonsuch-x: not found on PATH");
}

TEST_CASE("exec errors: what execve(2) refuses") {
  Site site;
  signal(SIGPIPE, SIG_IGN);
  site.config.scratch.clear();
  const Log log(site.config);
  warmproxy::detail::Process process(site.config, log);
  const auto start = [&](const std::string &text) {
    site.write_program("x", text);
    site.config.binary = site.app + "/x";
    const auto error = try_to_start(process);
    CHECK_FALSE(process.started());
    CHECK(process.pid() == 0);
    return error;
  };
  CHECK(contains(start("exit 0\n"), "a script without a #! line"));
  CHECK(contains(start("exit 0\r\n"), "a script without a #! line"));
  CHECK(contains(start(""), ": it is empty"));
  CHECK(contains(start("MZ\x01"), "another system or processor"));
  CHECK(contains(start("#!/nonsuch\n"), "/nonsuch does not exist"));
  CHECK(contains(start("#!nonsuch\n"), ": its interpreter nonsuch does not "));
  CHECK(contains(start("#!/bin/sh -e\r\n"), "carriage return"));
  CHECK(contains(start("#!" + site.app + "\n"),
                 ": its interpreter " + site.app + ": not a regular file"));
  const auto interpreter = site.app + "/y";
  const auto its = ": its interpreter " + interpreter + ": ";
  write_file(interpreter, "");
  CHECK(contains(start("#!" + interpreter + "\n"), its + "not executable"));
  site.write_program("y", "#!/nonsuch\n");
  CHECK(contains(start("#!" + interpreter + "\n"),
                 its + "its interpreter /nonsuch does not exist"));
  // Itself: this must end.
  CHECK(contains(start("#!" + site.app + "/x\n"), "symbolic links"));

  auto elf = read_file("/proc/self/exe");
  elf.resize(8192);
  const auto machine = elf.substr(18, 2);
  elf.replace(18, 2,
              machine == std::string("\xb7\0", 2) ? std::string("\x3e\0", 2)
                                                  : std::string("\xb7\0", 2));
  CHECK(contains(start(elf), "another system or processor"));
  elf.replace(18, 2, machine);
  const auto linker = elf.find("/lib", 64);
  REQUIRE(linker != std::string::npos);
  elf.replace(linker, 4, "/nix");
  CHECK(contains(start(elf), "its dynamic linker /nix"));

  site.config.directory = site.app + "/nonsuch";
  CHECK(start("#!/bin/sh\n") ==
        "directory " + site.app + "/nonsuch: No such file or directory");
}

TEST_CASE("exec errors: a file system mounted with noexec") {
  if (!is_root()) { return; }
  Site site;
  const auto mounted = site.directory / "mounted";
  mkdir(mounted.c_str(), 0755);
  if (mount("none", mounted.c_str(), "tmpfs", MS_NOEXEC, "size=1m")) {
    MESSAGE("skipped: no tmpfs can be mounted");
    return;
  }
  std::filesystem::copy(site.app + "/server", mounted + "/server");
  CHECK(contains(explain_unrunnable(mounted + "/server"), "noexec"));
  umount(mounted.c_str());
}

TEST_CASE("exec errors: a file that is still being written is tried again") {
  Site site;
  signal(SIGPIPE, SIG_IGN);
  site.config.scratch.clear();
  site.config.binary = site.app + "/sleep";
  std::filesystem::copy("/bin/true", site.config.binary);
  const Log log(site.config);
  warmproxy::detail::Process process(site.config, log);
  int fd = open(site.config.binary.c_str(), O_WRONLY | O_APPEND | O_CLOEXEC);
  int polls = 0;
  const auto give_up = [&] {
    if (++polls == 3) { fail_start("enough"); }
  };
  CHECK(try_to_start(process, 1, give_up) == "enough");
  const auto written = [&] {
    if (++polls == 6) { close(std::exchange(fd, -1)); }
  };
  CHECK(try_to_start(process, 1, written) == "");
  CHECK(fd == -1);
  process.stop(SteadyClock::now() + patience);
}

// ---- The child

TEST_CASE("child: argv[0] names the file as seen from its directory") {
  Site site;
  const auto argv0 = [&](const std::string &binary,
                         const std::string &directory,
                         const std::string &scratch = "") {
    site.config.binary = binary;
    site.config.directory = directory;
    site.config.scratch = scratch;
    return site.prepare().argv0; // started in app
  };
  std::filesystem::create_directories(site.app + "/venv/bin");
  symlink("/bin/sh", (site.app + "/venv/bin/python").c_str());
  const auto other = site.directory / "other";
  std::filesystem::create_directory(other);

  CHECK(argv0("./server", "") == "./server");
  CHECK(argv0("./server", site.app) == "./server");
  CHECK(argv0("./server", other) == site.app + "/server");
  CHECK(argv0("../app/server", "") == "../app/server");
  CHECK(argv0("../app/server", other) == "../app/server");
  CHECK(argv0("../app/server", site.app + "/venv") == site.app + "/server");
  CHECK(argv0("venv/bin/python", other) == site.app + "/venv/bin/python");
  CHECK(argv0("venv/bin/python", "venv") == "./bin/python");
  CHECK(argv0(site.app + "/server", "") == site.app + "/server");
  CHECK(argv0(site.app + "/server", other) == site.app + "/server");
  CHECK(argv0("sh", other) == "sh");

  CHECK(argv0("./server", site.app, site.scratch) == "./server");
  CHECK(argv0(site.app + "/server", site.app, site.scratch) == "./server");
  CHECK(argv0("../app/server", site.app, site.scratch) == "./server");
  CHECK(argv0("./server", other, site.scratch) == site.app + "/server");
  CHECK(argv0("sh", site.app, site.scratch) == "sh");
  CHECK(argv0("venv/bin/python", site.app, site.scratch) == "venv/bin/python");

  const Variable path("PATH", "venv/bin");
  CHECK(argv0("python", "") == "python");
  const Variable absolute("PATH", (site.app + "/venv/bin").c_str());
  CHECK(argv0("python", other) == "python");
  CHECK(argv0("python", site.app, site.scratch) == "./venv/bin/python");
  site.config.env["PATH"] = "/bin";
  CHECK(argv0("python", other) == site.app + "/venv/bin/python");
}

TEST_CASE("child: a script gets the same path as argv[0] would be") {
  Site site;
  signal(SIGPIPE, SIG_IGN);
  site.write_program("server", "#!/bin/sh\necho \"$0\" $PWD `pwd` > out\n");
  site.config.binary = site.app + "/server";
  const Log log(site.config);
  warmproxy::detail::Process process(site.config, log);
  REQUIRE(try_to_start(process) == "");
  support::wait_for([&] { return process.exited(); });
  process.stop(SteadyClock::now() + patience);
  const auto copy = site.copy();
  CHECK(read_file(copy + "/out") == "./server " + copy + " " + copy + "\n");
}

TEST_CASE("child: its environment") {
  const Variable host("HOST", "1"), hostname("HOSTNAME", "2"),
      ipc("VERCEL_IPC_PATH", "3"), ours("WARMPROXY_BINARY", "4"),
      home("HOME_OF", "5"), port("PORT", "6");
  const auto text = output(
      [](Config &config) {
        config.env = {{"HOST", "given"}, {"URL", "http://x:{port}/{port}"}};
      },
      "tr '\\0' '\\n' < /proc/self/environ");
  const auto lines = '\n' + text;
  CHECK(contains(lines, "\nHOST=given\n"));
  CHECK(contains(lines, "\nURL=http://x:1234/1234\n"));
  CHECK(contains(lines, "\nPORT=1234\n"));
  CHECK(contains(lines, "\nHOME_OF=5\n"));
  CHECK_FALSE(contains(lines, "\nHOSTNAME="));
  CHECK_FALSE(contains(lines, "\nVERCEL_IPC_PATH="));
  CHECK_FALSE(contains(lines, "\nWARMPROXY_"));
}

TEST_CASE("child: PWD is the working directory") {
  TemporaryDirectory directory;
  std::filesystem::create_directory(directory / "real");
  symlink("real", (directory / "link").c_str());
  const auto pwd = [&](const std::string &folder) {
    return output([&](Config &config) { config.directory = folder; },
                  "tr '\\0' '\\n' < /proc/$$/environ | grep ^PWD=");
  };
  const Variable inherited("PWD", "/");
  CHECK(pwd(directory / "real") == "PWD=" + directory / "real\n");
  CHECK(pwd(directory / "link") == "PWD=" + directory / "real\n");
  CHECK(pwd("") == "PWD=" + std::filesystem::current_path().string() + "\n");
}

TEST_CASE("child: its descriptors and signals") {
  CHECK(output("readlink /proc/$$/fd/0") == "/dev/null\n");
  CHECK(output("ls /proc/self/fd") == "0\n1\n2\n3\n"); // 3 is its own
  rlimit files{};
  getrlimit(RLIMIT_NOFILE, &files);
  Run run("exec 3< /dev/null 2> " + std::string("/dev/null; exit 7"));
  // All that the limit allows is in use.
  std::vector<int> used;
  for (int fd = dup(0); fd >= 0; fd = dup(0)) {
    used.push_back(fd);
    if (used.size() == 200) { break; }
  }
  REQUIRE(used.size() > 2);
  for (int i = 0; i < 2; ++i) { // for the pipe of the report
    close(used.back());
    used.pop_back();
  }
  const rlimit low{static_cast<rlim_t>(used.back()) + 3, files.rlim_max};
  setrlimit(RLIMIT_NOFILE, &low);
  const auto error = run.start();
  setrlimit(RLIMIT_NOFILE, &files);
  for (const int fd : used) {
    close(fd);
  }
  CHECK(error == "");
  CHECK(run.exits());
  CHECK(run.process.exit_text() == "exited with status 7");
  // The C library reserves signals 32 and 33 and resets them for nobody.
  CHECK(output("grep -E 'Sig(Blk|Ign)' /proc/self/status | tr -d '[:space:]' | "
               "sed -E 's/[01][08]0{7}$/000000000/'") ==
        "SigBlk:0000000000000000SigIgn:0000000000000000");
}

TEST_CASE("child: arguments know the port") {
  CHECK(output(
            [](Config &config) {
              config.args.push_back("--port={port}");
              config.args.push_back("{port}{port}");
            },
            "echo \"$@\"") == "--port=1234 12341234\n");
}

TEST_CASE("child: how it ended") {
  Run run("exit 3");
  CHECK_FALSE(run.process.started());
  CHECK_FALSE(run.process.exited());
  REQUIRE(run.start() == "");
  CHECK(run.process.started());
  CHECK(run.process.owns(run.process.pid()));
  CHECK_FALSE(run.process.owns(getpid()));
  REQUIRE(run.exits());
  CHECK(run.process.exit_text() == "exited with status 3");
  CHECK(run.process.exit_hint() == "");
  run.stop();
  CHECK_FALSE(run.process.started());
  CHECK(run.process.exit_text() == "exited with status 3");
  run.config.args = {"-c", "kill -SEGV $$"};
  REQUIRE(run.start() == "");
  CHECK(run.exits());
  run.stop();
  CHECK(run.process.exit_text() == "was killed by signal 11");
  run.config.args = {"-c", "sleep 100 & exit 0"};
  REQUIRE(run.start() == "");
  CHECK(run.exits());
  CHECK(contains(run.process.exit_hint(), "background"));
}

// ---- The end

TEST_CASE("stop: SIGTERM goes to the target alone at first") {
  Run run;
  const auto heard = run.directory / "heard";
  // The child notes what it gets from the group; the launcher passes it on.
  run.config.args = {"-c",
                     "trap 'kill $child; wait $child; exit 5' TERM\n"
                     "sh -c 'trap \"echo term >> " +
                         heard + "; exit 0\" TERM; echo ready >> " + heard +
                         "; while :; do sleep 0.01; done' & child=$!; wait"};
  REQUIRE(run.start() == "");
  REQUIRE(support::wait_for([&] { return read_file(heard) == "ready\n"; }));
  run.stop();
  CHECK(read_file(heard) == "ready\nterm\n");
  CHECK(run.process.exit_text() == "exited with status 5");
}

// A second one ends many servers at once.
TEST_CASE("stop: the rest of the group gets its SIGTERM without the target") {
  Run run;
  const auto heard = run.directory / "heard", child = run.directory / "child";
  run.config.args = {"-c", "trap 'echo term >> " + heard +
                               "' TERM\n"
                               "sh -c 'trap \"echo term >> " +
                               child +
                               "; exit 0\" TERM; while :; do sleep 0.01; done' "
                               "& echo ready >> " +
                               heard + "; while :; do sleep 0.01; done"};
  REQUIRE(run.start() == "");
  REQUIRE(support::wait_for([&] { return read_file(heard) == "ready\n"; }));
  run.stop(Milliseconds(2000));
  CHECK(read_file(child) == "term\n");
  CHECK(read_file(heard) == "ready\nterm\n");
  CHECK(run.process.exit_text() == "was killed by signal 9");
}

// A launcher may pass it on and exit before the server does.
TEST_CASE("stop: the rest of the group has a while before its own SIGTERM") {
  Run run;
  const auto heard = run.directory / "heard", ready = run.directory / "ready",
             gone = run.directory / "gone";
  run.config.args = {"-c", "trap 'kill $child; while ! test -s " + heard +
                               "; do sleep 0.01; done; echo > " + gone +
                               "; exit 5' TERM\n"
                               "sh -c 'trap \"echo term >> " +
                               heard + "\" TERM; echo > " + ready +
                               "; while ! test -e " + gone +
                               "; do sleep 0.05; done' & child=$!; wait"};
  REQUIRE(run.start() == "");
  REQUIRE(support::wait_for([&] { return !read_file(ready).empty(); }));
  run.stop();
  CHECK(read_file(heard) == "term\n");
  CHECK(run.process.exit_text() == "exited with status 5");
}

TEST_CASE("stop: the child of a shell that just dies is told, too") {
  for (const bool crash : {false, true}) {
    Run run;
    const auto heard = run.directory / "heard";
    run.config.args = {"-c", "sh -c 'trap \"echo term >> " + heard +
                                 "; exit 0\" TERM; echo ready >> " + heard +
                                 "; while :; do sleep 0.01; done' & wait"};
    REQUIRE(run.start() == "");
    REQUIRE(support::wait_for([&] { return read_file(heard) == "ready\n"; }));
    const auto group = run.process.pid();
    if (crash) {
      kill(group, SIGKILL);
      REQUIRE(run.exits());
    }
    run.stop(Milliseconds(5000));
    CHECK(read_file(heard) == "ready\nterm\n");
    CHECK(children_in_group(group).empty());
  }
}

TEST_CASE("stop: a stopped target hears SIGTERM") {
  Run run;
  const auto ready = run.directory / "ready";
  run.config.args = {"-c", "trap 'exit 5' TERM; echo > " + ready +
                               "; while :; do sleep 0.01; done"};
  REQUIRE(run.start() == "");
  REQUIRE(support::wait_for([&] { return !read_file(ready).empty(); }));
  kill(run.process.pid(), SIGSTOP);
  run.stop();
  CHECK(run.process.exit_text() == "exited with status 5");
}

TEST_CASE("stop: who does not hear is killed at the deadline") {
  Run run;
  const auto ready = run.directory / "ready";
  run.config.args = {"-c",
                     "trap '' TERM; (while :; do sleep 1; done) & echo > " +
                         ready + "; wait"};
  REQUIRE(run.start() == "");
  REQUIRE(support::wait_for([&] { return !read_file(ready).empty(); }));
  const auto group = run.process.pid();
  SUBCASE("after a while") { run.stop(Milliseconds(100)); }
  SUBCASE("at once") { run.stop(Milliseconds(0)); }
  CHECK(run.process.exit_text() == "was killed by signal 9");
  CHECK(children_in_group(group).empty());
  CHECK_FALSE(run.process.started());
}

TEST_CASE("stop: a target that may not be signalled is given up") {
  if (!is_root()) { return; }
  CHECK(status_of_child(fork_and_run([] {
          Run run("exec sleep 100");
          if (!run.start().empty() || setresuid(65534, 65534, 0)) { return 1; }
          const auto pid = run.process.pid();
          run.stop(Milliseconds(50));
          const bool given_up =
              run.logged("cannot be ended: Operation not permitted") &&
              !run.process.started() && kill(pid, 0) != 0 && errno == EPERM;
          if (setresuid(0, 0, 0) == 0) { kill(pid, SIGKILL); }
          return given_up ? 0 : 2;
        })) == 0);
}

// ---- What it listens on

TEST_CASE("members: without descriptors nobody knows them" *
          doctest::skip(support::sanitized)) {
  rlimit before{};
  getrlimit(RLIMIT_NOFILE, &before);
  const rlimit none{0, before.rlim_max};
  setrlimit(RLIMIT_NOFILE, &none);
  const bool listed = for_each_member(getpgrp(), [](pid_t) {});
  setrlimit(RLIMIT_NOFILE, &before);
  CHECK_FALSE(listed);
}

// Its other threads hold its sockets until they have ended, too.
TEST_CASE("members: a process of which only the first thread has ended" *
          doctest::skip(!support::on_linux)) {
  const auto child = fork();
  if (child == 0) {
    setpgid(0, 0);
    std::thread([] { pause(); }).detach();
    syscall(SYS_exit, 0); // of this thread alone
  }
  const auto is_member = [child] {
    bool found = false;
    CHECK(for_each_member(child, [&](pid_t) { found = true; }));
    return found;
  };
  REQUIRE(support::wait_for([&] {
    return read_start(concat("/proc/", decimal(child), "/stat")).find(") Z") !=
           std::string::npos;
  }));
  CHECK(is_member());
  kill(child, SIGKILL);
  CHECK(support::wait_for([&] { return !is_member(); }));
  waitpid(child, nullptr, 0);
}

TEST_CASE("listeners: the sockets of the process group and no others" *
          doctest::skip(!support::on_linux)) {
  Run run;
  run.config.binary = built("fake");
  run.config.args = {};
  const int port = support::free_port();
  Descriptor other = new_socket(AF_INET);
  SocketAddress address(Endpoint{false, 0});
  bind(other.get(), address.get(), address.size);
  listen(other.get(), 1);
  CHECK(listeners_of(run.process.pid()).empty());
  SUBCASE("the target's own") {}
  SUBCASE("those of a child") {
    run.config.binary = "sh";
    run.config.args = {"-c", built("fake") + " & wait"};
  }
  REQUIRE(run.start(port) == "");
  std::vector<ListeningSocket> found;
  REQUIRE(support::wait_for([&] {
    found = listeners_of(run.process.pid());
    return !found.empty();
  }));
  REQUIRE(found.size() == 1);
  CHECK(found[0].address == "127.0.0.1");
  CHECK(found[0].port == port);
  CHECK(found[0].reachable);
  CHECK_FALSE(found[0].ipv6);
  CHECK(found[0].program == "fake");
  run.stop();
  CHECK(listeners_of(run.process.pid()).empty());
}

TEST_CASE("listeners: which of them can be reached" *
          doctest::skip(!support::on_linux)) {
  struct Case {
    const char *host, *address;
    bool reachable, ipv6;
  };
  for (const auto &c : {Case{"0.0.0.0", "0.0.0.0", true, false},
                        Case{"127.0.0.2", "127.0.0.2", false, false}}) {
    INFO(c.host);
    Run run;
    run.config.binary = built("fake");
    run.config.args = {"--host", c.host};
    REQUIRE(run.start(support::free_port()) == "");
    std::vector<ListeningSocket> found;
    REQUIRE(support::wait_for([&] {
      found = listeners_of(run.process.pid());
      return !found.empty();
    }));
    CHECK(found[0].address == c.address);
    CHECK(found[0].reachable == c.reachable);
    CHECK(found[0].ipv6 == c.ipv6);
  }
  CHECK(address_from_hex("0100007F") == "127.0.0.1");
  CHECK(address_from_hex("00000000000000000000000001000000") == "::1");
  CHECK(address_from_hex("00000000000000000000000000000000") == "::");
  CHECK(address_from_hex("0000000000000000FFFF00000100007F") == "127.0.0.1");
}

// ---- The watchdog

TEST_CASE("watchdog: kills the group when we are killed") {
  TemporaryDirectory directory;
  const auto file = directory / "group";
  // A child that the embedding program forked holds the watchdog's pipe.
  for (const bool with_child : {false, true}) {
    if (with_child && !support::on_linux) { continue; } // a pidfd tells
    unlink(file.c_str());
    const auto pid = fork_and_run([&] {
      Run run;
      run.config.args = {"-c", "sleep 100 & wait"};
      if (!run.start().empty()) { return 1; }
      const auto group = run.process.pid();
      const auto child = with_child ? fork() : 1;
      if (child == 0) {
        pause();
        _exit(0);
      }
      support::wait_for([&] { return children_in_group(group).size() == 2; });
      write_file(file + ".new",
                 std::to_string(group) + " " + std::to_string(child));
      rename((file + ".new").c_str(), file.c_str());
      pause();
      return 0;
    });
    REQUIRE(support::wait_for([&] { return !read_file(file).empty(); }));
    pid_t group = 0, child = 0;
    std::istringstream(read_file(file)) >> group >> child;
    CHECK(children_in_group(group).size() == 2);
    kill(pid, SIGKILL);
    CHECK(status_of_child(pid) == -SIGKILL);
    CHECK(support::wait_for([&] { return children_in_group(group).empty(); }));
    if (child > 1) { kill(child, SIGKILL); }
  }
}

TEST_CASE("watchdog: the destructor does not wait for forked children") {
  signal(SIGPIPE, SIG_IGN);
  LoggedConfig setting;
  const Log log(setting.config);
  auto process =
      std::make_unique<warmproxy::detail::Process>(setting.config, log);
  const auto before = children_of(getpid()).size();
  const auto child = fork_and_run([] {
    pause();
    return 0;
  });
  process.reset();
  CHECK(children_of(getpid()).size() ==
        before); // ours is gone, the child lives
  kill(child, SIGKILL);
  CHECK(status_of_child(child) == -SIGKILL);
}
