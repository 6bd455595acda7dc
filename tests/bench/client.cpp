//
//  client.cpp - what wrk cannot measure
//
//  All requests go to 127.0.0.1:PORT; times are printed in nanoseconds.
//
//    client cold PORT [COMMAND...]
//        from the exec of COMMAND (without one: from now) to the end of the
//        first response; COMMAND is stopped afterwards
//    client burst PORT COUNT PATH [COMMAND...]
//        as cold, but with COUNT requests at once and whatever their status is:
//        time to the first and to the last response, number of 200s, a status
//        that was not 200 (0: none; 1: a connection without a response)
//    client crash PORT CONNECTIONS SECONDS METHOD
//        requests for so long, from connections that are made anew when they
//        fail: number of 200s, number of others, longest time between two 200s
//    client start PORT COMMAND...
//        from exec to the first accepted connection
//    client latency PORT COUNT
//        p50, p99 and worst of COUNT requests on one connection
//    client event PORT COUNT
//        p50, p99 and worst from connect to the first byte of an event stream
//    client down PORT BYTES, client up PORT BYTES
//        the time that a download or an upload takes
//    client load PORT CONNECTIONS COUNT
//        the time COUNT requests take, spread over CONNECTIONS that each have
//        one under way
//    client idle PORT COUNT, client busy PORT COUNT
//        COUNT connections after one request each, or in the middle of a
//        download that is read slowly; prints "ready" and holds them until its
//        standard input ends
//
//  BENCH_PREFIX goes in front of every path.
//

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <spawn.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>
#include <strings.h>
#include <thread>
#include <vector>

extern char **environ;

namespace {

using Clock = std::chrono::steady_clock;

int port = 0;
std::string prefix;

[[noreturn]] void fail(const std::string &what) {
  std::fprintf(stderr, "client: %s (%s)\n", what.c_str(), std::strerror(errno));
  std::exit(1);
}

long long since(Clock::time_point start) {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() -
                                                              start)
      .count();
}

// -1 where nobody listens (yet).
int try_connect() {
  const auto fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  if (connect(fd, reinterpret_cast<sockaddr *>(&address), sizeof address) !=
      0) {
    close(fd);
    return -1;
  }
  const int on = 1;
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  const timeval limit{60, 0}; // what takes longer counts as no response
  setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
  return fd;
}

int connect_or_fail() {
  const auto fd = try_connect();
  if (fd < 0) { fail("connect"); }
  return fd;
}

std::string request(const std::string &method, const std::string &path,
                    const std::string &lines = "") {
  return method + " " + prefix + path +
         " HTTP/1.1\r\nHost: 127.0.0.1:" + std::to_string(port) + "\r\n" +
         lines + "\r\n";
}

bool try_send_all(int fd, const std::string &data) {
  for (size_t sent = 0; sent < data.size();) {
    const auto n =
        send(fd, data.data() + sent, data.size() - sent, MSG_NOSIGNAL);
    if (n <= 0) { return false; }
    sent += static_cast<size_t>(n);
  }
  return true;
}

void send_all(int fd, const std::string &data) {
  if (!try_send_all(fd, data)) { fail("send"); }
}

struct Head {
  std::string text;
  int status = 0;
  long long length = -1;   // -1: chunked, or until the connection closes
  long long body_read = 0; // bytes of the body that came with the head
};

bool try_read_head(int fd, Head &head) {
  char buffer[16384];
  for (;;) {
    const auto n = recv(fd, buffer, sizeof buffer, 0);
    if (n <= 0) { return false; }
    head.text.append(buffer, static_cast<size_t>(n));
    const auto end = head.text.find("\r\n\r\n");
    if (end == std::string::npos) { continue; }
    head.body_read = static_cast<long long>(head.text.size() - end - 4);
    const auto *length = strcasestr(head.text.c_str(), "\r\nContent-Length:");
    if (length) { head.length = std::atoll(length + 17); }
    head.status = std::atoi(head.text.c_str() + 9);
    return true;
  }
}

Head read_head(int fd) {
  Head head;
  if (!try_read_head(fd, head)) { fail("no response"); }
  if (head.status != 200) {
    fail("response " + head.text.substr(0, head.text.find('\r')));
  }
  return head;
}

bool try_read_body(int fd, const Head &head) {
  for (auto rest = head.length - head.body_read; rest > 0;) {
    // MSG_TRUNC discards the bytes without copying them to us.
    const auto n = recv(
        fd, nullptr, static_cast<size_t>(std::min(rest, 1LL << 22)), MSG_TRUNC);
    if (n <= 0) { return false; }
    rest -= n;
  }
  return true;
}

void read_body(int fd, const Head &head) {
  if (!try_read_body(fd, head)) { fail("the response ended early"); }
}

void read_response(int fd) { read_body(fd, read_head(fd)); }

// The status, or 1 where no complete response came.
int try_exchange(int fd, const std::string &request) {
  Head head;
  return try_send_all(fd, request) && try_read_head(fd, head) &&
                 try_read_body(fd, head)
             ? head.status
             : 1;
}

void print_percentiles(std::vector<long long> times) {
  std::sort(times.begin(), times.end());
  std::printf("%lld %lld %lld\n", times[times.size() / 2],
              times[times.size() * 99 / 100], times.back());
}

pid_t spawn(char **command) {
  pid_t pid = 0;
  posix_spawnattr_t attributes;
  posix_spawnattr_init(&attributes);
  posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETPGROUP);
  posix_spawnattr_setpgroup(&attributes, 0);
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  for (auto fd = 0; fd < 3; fd++) { // ours are a pipe that others wait for
    posix_spawn_file_actions_addopen(&actions, fd, "/dev/null", O_RDWR, 0);
  }
  if ((errno = posix_spawnp(&pid, command[0], &actions, &attributes, command,
                            environ)) != 0) {
    fail(command[0]);
  }
  return pid;
}

// The whole group: a proxy that forgets its target must not leave it to us.
void stop(pid_t pid) {
  kill(-pid, SIGTERM);
  for (auto i = 0; i < 300; i++) {
    if (waitpid(pid, nullptr, WNOHANG) == pid) {
      kill(-pid, SIGKILL);
      return;
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  kill(-pid, SIGKILL);
  waitpid(pid, nullptr, 0);
}

int first_connection(Clock::time_point start) {
  for (;;) {
    const auto fd = try_connect();
    if (fd >= 0) { return fd; }
    if (since(start) > 60'000'000'000) { fail("nobody listens"); }
    std::this_thread::sleep_for(std::chrono::microseconds(50));
  }
}

void cold(char **command) {
  const auto start = Clock::now();
  const auto pid = *command ? spawn(command) : 0;
  const auto fd = first_connection(start);
  send_all(fd, request("GET", "/"));
  read_response(fd);
  std::printf("%lld\n", since(start));
  if (pid) { stop(pid); }
}

// A thread each, or one slow read would delay what the others measure.
void burst(int count, const std::string &path, char **command) {
  const auto start = Clock::now();
  const auto pid = *command ? spawn(command) : 0;
  if (pid) { close(first_connection(start)); }
  const auto get = request("GET", path);
  std::mutex mutex;
  std::vector<long long> times;
  auto ok = 0;
  auto other = 0;
  std::vector<std::thread> threads;
  for (auto i = 0; i < count; i++) {
    threads.emplace_back([&] {
      const auto fd = try_connect();
      const auto status = fd < 0 ? 1 : try_exchange(fd, get);
      const std::lock_guard<std::mutex> lock(mutex);
      times.push_back(since(start));
      if (status == 200) {
        ok++;
      } else {
        other = status;
      }
    });
  }
  for (auto &thread : threads) {
    thread.join();
  }
  std::printf("%lld %lld %d %d\n", times.front(), times.back(), ok, other);
  if (pid) { stop(pid); }
}

void crash(int connections, int seconds, const std::string &method) {
  const auto data =
      method == "GET"
          ? request("GET", "/other")
          : request(method, "/upload", "Content-Length: 4\r\n") + "body";
  const auto start = Clock::now();
  std::atomic<long long> ok{0}, failed{0}, last{0}, longest{0};
  std::vector<std::thread> threads;
  for (auto i = 0; i < connections; i++) {
    threads.emplace_back([&] {
      auto fd = -1;
      while (since(start) < seconds * 1'000'000'000LL) {
        if (fd < 0) { fd = try_connect(); }
        if (fd >= 0 && try_exchange(fd, data) == 200) {
          ok++;
          const auto now = since(start);
          const auto gap = now - last.exchange(now);
          auto known = longest.load();
          while (gap > known && !longest.compare_exchange_weak(known, gap)) {}
          continue;
        }
        failed++;
        if (fd >= 0) { close(fd); }
        fd = -1;
        std::this_thread::sleep_for(std::chrono::milliseconds(10));
      }
    });
  }
  for (auto &thread : threads) {
    thread.join();
  }
  std::printf("%lld %lld %lld\n", ok.load(), failed.load(),
              std::max(longest.load(), since(start) - last.load()));
}

void start(char **command) {
  const auto start = Clock::now();
  const auto pid = spawn(command);
  first_connection(start);
  std::printf("%lld\n", since(start));
  stop(pid);
}

void latency(int count) {
  const auto fd = connect_or_fail();
  const auto get = request("GET", "/");
  std::vector<long long> times;
  for (auto i = -count / 10; i < count; i++) {
    const auto start = Clock::now();
    send_all(fd, get);
    read_response(fd);
    if (i >= 0) { times.push_back(since(start)); }
  }
  print_percentiles(times);
}

void event(int count) {
  std::vector<long long> times;
  for (auto i = 0; i < count; i++) {
    const auto start = Clock::now();
    const auto fd = connect_or_fail();
    send_all(fd, request("GET", "/sse?every=60000&for=1000",
                         "Accept: text/event-stream\r\n"));
    const auto head = read_head(fd);
    char byte = 0;
    if (head.body_read == 0 && recv(fd, &byte, 1, 0) != 1) { fail("no event"); }
    times.push_back(since(start));
    close(fd);
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  print_percentiles(times);
}

void down(long long bytes) {
  const auto fd = connect_or_fail();
  const auto start = Clock::now();
  send_all(fd, request("GET", "/bytes?n=" + std::to_string(bytes)));
  auto head = read_head(fd);
  if (head.length != bytes) { fail("not the length that was asked for"); }
  read_body(fd, head);
  std::printf("%lld\n", since(start));
}

void up(long long bytes) {
  constexpr size_t kBlock = 1 << 20;
  const auto block = memfd_create("block", MFD_CLOEXEC);
  if (ftruncate(block, kBlock) != 0) { fail("memfd"); }
  const auto fd = connect_or_fail();
  const auto start = Clock::now();
  send_all(fd, request("POST", "/upload",
                       "Content-Length: " + std::to_string(bytes) + "\r\n"));
  for (auto rest = bytes; rest > 0;) {
    off_t offset = 0;
    const auto n =
        sendfile(fd, block, &offset,
                 static_cast<size_t>(std::min<long long>(rest, kBlock)));
    if (n <= 0) { fail("upload"); }
    rest -= n;
  }
  read_response(fd);
  std::printf("%lld\n", since(start));
}

void load(size_t connections, long long count) {
  const auto get = request("GET", "/");
  const auto epoll = epoll_create1(EPOLL_CLOEXEC);
  std::vector<int> fds;
  for (size_t i = 0; i < connections; i++) {
    fds.push_back(connect_or_fail());
    send_all(fds.back(), get);
    read_response(fds.back());
    epoll_event interest{};
    interest.events = EPOLLIN;
    interest.data.fd = fds.back();
    epoll_ctl(epoll, EPOLL_CTL_ADD, fds.back(), &interest);
  }
  const auto start = Clock::now();
  auto to_send = count;
  for (const auto fd : fds) {
    if (to_send-- > 0) { send_all(fd, get); }
  }
  std::vector<epoll_event> events(1024);
  for (auto to_read = count; to_read > 0;) {
    const auto n = epoll_wait(epoll, events.data(), 1024, 30000);
    if (n <= 0) { fail("no response for 30 s"); }
    for (auto i = 0; i < n; i++, to_read--) {
      const auto fd = events[static_cast<size_t>(i)].data.fd;
      read_response(fd);
      if (to_send-- > 0) { send_all(fd, get); }
    }
  }
  std::printf("%lld\n", since(start));
}

bool input_ended() {
  char byte = 0;
  pollfd input{STDIN_FILENO, POLLIN, 0};
  return poll(&input, 1, 0) > 0 && read(STDIN_FILENO, &byte, 1) <= 0;
}

void print_ready() {
  std::puts("ready");
  std::fflush(stdout);
}

void idle(int count) {
  for (auto i = 0; i < count; i++) {
    const auto fd = connect_or_fail();
    send_all(fd, request("GET", "/"));
    read_response(fd);
  }
  print_ready();
  while (!input_ended()) {
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
}

void busy(int count) {
  std::vector<int> fds;
  for (auto i = 0; i < count; i++) {
    fds.push_back(connect_or_fail());
    send_all(fds.back(), request("GET", "/bytes?n=1000000000000"));
    read_head(fds.back());
  }
  // Each is read a little at a time, so that all of them stay under way.
  for (auto round = 0; !input_ended(); round++) {
    for (const auto fd : fds) {
      if (recv(fd, nullptr, 1 << 18, MSG_TRUNC | MSG_DONTWAIT) == 0) {
        fail("the stream ended");
      }
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    if (round == 50) { print_ready(); }
  }
}

} // namespace

int main(int argc, char **argv) {
  if (argc < 3) {
    std::fputs("usage: see the head of client.cpp\n", stderr);
    return 2;
  }
  rlimit files{};
  getrlimit(RLIMIT_NOFILE, &files);
  files.rlim_cur = files.rlim_max;
  setrlimit(RLIMIT_NOFILE, &files);
  prctl(PR_SET_TIMERSLACK, 1UL); // or a sleep of 50 us takes 100
  const std::string mode = argv[1];
  port = std::atoi(argv[2]);
  if (const auto *value = std::getenv("BENCH_PREFIX")) { prefix = value; }
  const auto number = [&](int i) { return i < argc ? std::atoll(argv[i]) : 0; };
  if (mode == "cold") {
    cold(argv + 3);
  } else if (mode == "burst" && argc > 4) {
    burst(static_cast<int>(number(3)), argv[4], argv + 5);
  } else if (mode == "crash" && argc > 5) {
    crash(static_cast<int>(number(3)), static_cast<int>(number(4)), argv[5]);
  } else if (mode == "start" && argc > 3) {
    start(argv + 3);
  } else if (mode == "latency") {
    latency(static_cast<int>(number(3)));
  } else if (mode == "event") {
    event(static_cast<int>(number(3)));
  } else if (mode == "down") {
    down(number(3));
  } else if (mode == "up") {
    up(number(3));
  } else if (mode == "load") {
    load(static_cast<size_t>(number(3)), number(4));
  } else if (mode == "idle") {
    idle(static_cast<int>(number(3)));
  } else if (mode == "busy") {
    busy(static_cast<int>(number(3)));
  } else {
    std::fputs("client: no such mode\n", stderr);
    return 2;
  }
}
