//
//  client.cpp - what wrk cannot measure
//
//  Everything is asked of 127.0.0.1:PORT, everything printed is in nanoseconds.
//
//    client cold PORT [COMMAND...]   from the exec of COMMAND (or from now, if
//                                    there is none) to the end of the first
//                                    answer; COMMAND is stopped afterwards
//    client start PORT COMMAND...    from exec to the first accepted connect
//    client latency PORT COUNT       p50, p99 and worst of COUNT requests on
//    one
//                                    connection
//    client event PORT COUNT         p50, p99 and worst from connect to the
//                                    first byte of an event stream
//    client down PORT BYTES          the time a download takes
//    client up PORT BYTES            the time an upload takes
//    client load PORT CONNECTIONS COUNT
//                                    the time COUNT requests take, spread over
//                                    CONNECTIONS that each have one under way
//    client idle PORT COUNT          COUNT connections after one request each,
//    client busy PORT COUNT          or in the middle of a slowly read
//    download;
//                                    prints "ready", holds them until its
//                                    standard input ends
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
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <strings.h>
#include <thread>
#include <vector>

extern char **environ;

namespace {

using Clock = std::chrono::steady_clock;

int port = 0;

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
  return fd;
}

int connect_or_fail() {
  const auto fd = try_connect();
  if (fd < 0) { fail("connect"); }
  return fd;
}

std::string request(const std::string &method, const std::string &path,
                    const std::string &lines = "") {
  return method + " " + path +
         " HTTP/1.1\r\nHost: 127.0.0.1:" + std::to_string(port) + "\r\n" +
         lines + "\r\n";
}

void send_all(int fd, const std::string &data) {
  for (size_t sent = 0; sent < data.size();) {
    const auto n =
        send(fd, data.data() + sent, data.size() - sent, MSG_NOSIGNAL);
    if (n <= 0) { fail("send"); }
    sent += static_cast<size_t>(n);
  }
}

struct Head {
  std::string text;
  long long length = -1; // -1: chunked, or until the connection closes
  long long behind = 0;  // bytes of the body that came with it
};

Head read_head(int fd) {
  Head head;
  char buffer[16384];
  for (;;) {
    const auto n = recv(fd, buffer, sizeof buffer, 0);
    if (n <= 0) { fail("no answer"); }
    head.text.append(buffer, static_cast<size_t>(n));
    const auto end = head.text.find("\r\n\r\n");
    if (end == std::string::npos) { continue; }
    head.behind = static_cast<long long>(head.text.size() - end - 4);
    const auto *length = strcasestr(head.text.c_str(), "\r\nContent-Length:");
    if (length) { head.length = std::atoll(length + 17); }
    if (head.text.compare(8, 4, " 200") != 0) {
      fail("answered " + head.text.substr(0, head.text.find('\r')));
    }
    return head;
  }
}

void read_body(int fd, const Head &head) {
  for (auto rest = head.length - head.behind; rest > 0;) {
    // MSG_TRUNC throws the bytes away without copying them to us.
    const auto n = recv(
        fd, nullptr, static_cast<size_t>(std::min(rest, 1LL << 22)), MSG_TRUNC);
    if (n <= 0) { fail("the answer ended early"); }
    rest -= n;
  }
}

void read_answer(int fd) { read_body(fd, read_head(fd)); }

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
  read_answer(fd);
  std::printf("%lld\n", since(start));
  if (pid) { stop(pid); }
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
    read_answer(fd);
    if (i >= 0) { times.push_back(since(start)); }
  }
  print_percentiles(times);
}

void event(int count) {
  std::vector<long long> times;
  for (auto i = 0; i < count; i++) {
    const auto start = Clock::now();
    const auto fd = connect_or_fail();
    send_all(fd, request("GET", "/sse?every=60000"));
    const auto head = read_head(fd);
    char byte = 0;
    if (head.behind == 0 && recv(fd, &byte, 1, 0) != 1) { fail("no event"); }
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
  read_answer(fd);
  std::printf("%lld\n", since(start));
}

void load(size_t connections, long long count) {
  const auto get = request("GET", "/");
  const auto epoll = epoll_create1(EPOLL_CLOEXEC);
  std::vector<int> fds;
  for (size_t i = 0; i < connections; i++) {
    fds.push_back(connect_or_fail());
    send_all(fds.back(), get);
    read_answer(fds.back());
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
    if (n <= 0) { fail("no answer for 30 s"); }
    for (auto i = 0; i < n; i++, to_read--) {
      const auto fd = events[static_cast<size_t>(i)].data.fd;
      read_answer(fd);
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

void say_ready() {
  std::puts("ready");
  std::fflush(stdout);
}

void idle(int count) {
  for (auto i = 0; i < count; i++) {
    const auto fd = connect_or_fail();
    send_all(fd, request("GET", "/"));
    read_answer(fd);
  }
  say_ready();
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
    if (round == 50) { say_ready(); }
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
  const auto number = [&](int i) { return i < argc ? std::atoll(argv[i]) : 0; };
  if (mode == "cold") {
    cold(argv + 3);
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
