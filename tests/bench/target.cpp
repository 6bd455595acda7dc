//
//  target.cpp - the program that every proxy of the benchmark stands before
//
//  One thread, epoll, kept-alive connections, prepared responses: built so that
//  the proxy is measured and never what is behind it.
//
//    /                 a small page
//    /bytes?n=N        N bytes with a Content-Length, sent without a copy
//    /upload           reads a body and responds with its length
//    /sse?every=MS&for=MS
//                      an event stream: one event at once, then one every MS,
//                      and its end after that time
//    anything else     the small page
//
//  PORT            the port it listens on, on 127.0.0.1 only
//  BENCH_BOOT_MS   how long it takes to start listening; only time in which it
//                  runs counts, not time in which it is stopped
//  BENCH_503_MS    how long after that it responds with 503 to everything
//  BENCH_PAGE_MS   how long / takes, during which its one thread does nothing
//                  else
//

#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <strings.h>
#include <thread>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;

constexpr off_t kBlock = 1 << 20;

std::chrono::milliseconds from_env(const char *name) {
  const auto *value = std::getenv(name);
  return std::chrono::milliseconds(value ? std::atoi(value) : 0);
}

struct Connection {
  int fd = -1;
  std::string in;            // a request head, incomplete
  long long body = 0;        // of the upload: bytes left
  long long body_length = 0; // of the upload: its length
  bool uploading = false;
  long long down = 0;                 // of the download: bytes left
  std::string out;                    // not yet accepted by the socket
  std::chrono::milliseconds every{0}; // of the event stream; 0: none
  Clock::time_point next_event;
  Clock::time_point stream_end;
  bool wants_write = false;
};

class Target {
public:
  explicit Target(int port) {
    block_ = memfd_create("block", MFD_CLOEXEC);
    const std::string letters = "abcdefghijklmnopqrstuvwxyz012345";
    std::string block;
    while (block.size() < static_cast<size_t>(kBlock)) {
      block += letters;
    }
    if (write(block_, block.data(), block.size()) != kBlock) { std::abort(); }

    const std::string page = "<!doctype html><title>target</title><p>up\n";
    page_ = "HTTP/1.1 200 OK\r\n"
            "Date: Thu, 01 Jan 2026 00:00:00 GMT\r\n"
            "Content-Type: text/html; charset=utf-8\r\n"
            "Cache-Control: no-cache\r\n"
            "Content-Length: " +
            std::to_string(page.size()) + "\r\n\r\n" + page;

    listener_ = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    const int on = 1;
    setsockopt(listener_, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(static_cast<uint16_t>(port));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (bind(listener_, reinterpret_cast<sockaddr *>(&address),
             sizeof address) != 0 ||
        listen(listener_, 4096) != 0) {
      std::perror("target: listen");
      std::exit(1);
    }
    epoll_ = epoll_create1(EPOLL_CLOEXEC);
    watch(EPOLL_CTL_ADD, listener_, EPOLLIN);
    ready_at_ = Clock::now() + from_env("BENCH_503_MS");
  }

  [[noreturn]] void run() {
    std::vector<epoll_event> events(1024);
    for (;;) {
      auto n = epoll_wait(epoll_, events.data(),
                          static_cast<int>(events.size()), streams_ ? 1 : -1);
      for (auto i = 0; i < n; i++) {
        const auto fd = events[static_cast<size_t>(i)].data.fd;
        if (fd == listener_) {
          accept_all();
        } else if (auto &c = connections_[static_cast<size_t>(fd)]) {
          if (!serve(*c, events[static_cast<size_t>(i)].events)) { drop(c); }
        }
      }
      if (streams_) { send_events(); }
    }
  }

private:
  void watch(int operation, int fd, uint32_t events) const {
    epoll_event event{};
    event.events = events;
    event.data.fd = fd;
    epoll_ctl(epoll_, operation, fd, &event);
  }

  void accept_all() {
    for (;;) {
      const auto fd =
          accept4(listener_, nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC);
      if (fd < 0) { return; }
      const int on = 1;
      setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
      if (connections_.size() <= static_cast<size_t>(fd)) {
        connections_.resize(static_cast<size_t>(fd) + 1);
      }
      auto &c = connections_[static_cast<size_t>(fd)];
      c = std::make_unique<Connection>();
      c->fd = fd;
      watch(EPOLL_CTL_ADD, fd, EPOLLIN);
    }
  }

  void drop(std::unique_ptr<Connection> &c) {
    if (c->every.count() != 0) { streams_--; }
    close(c->fd);
    c.reset();
  }

  // Returns false when the connection has to be closed.
  bool serve(Connection &c, uint32_t events) {
    if ((events & EPOLLOUT) != 0 && !flush(c)) { return false; }
    if ((events & (EPOLLIN | EPOLLHUP | EPOLLERR)) == 0) { return true; }
    if (c.uploading) { return take_body(c); }
    char buffer[16384];
    const auto n = recv(c.fd, buffer, sizeof buffer, 0);
    if (n <= 0) { return n < 0 && errno == EAGAIN; }
    c.in.append(buffer, static_cast<size_t>(n));
    const auto end = c.in.find("\r\n\r\n");
    if (end == std::string::npos) { return c.in.size() < 65536; }
    const auto head = c.in.substr(0, end + 2);
    const auto behind = static_cast<long long>(c.in.size() - end - 4);
    c.in.clear();
    return answer(c, head, behind);
  }

  bool answer(Connection &c, const std::string &head, long long behind) {
    const auto from = head.find(' ') + 1;
    const auto path = head.substr(from, head.find(' ', from) - from);
    if (Clock::now() < ready_at_) {
      return send_all(c, "HTTP/1.1 503 Service Unavailable\r\n"
                         "Content-Length: 0\r\n\r\n");
    }
    if (path == "/") { std::this_thread::sleep_for(page_time_); }
    if (path.compare(0, 6, "/bytes") == 0) {
      c.down = number(path, "n=");
      return send_all(c, "HTTP/1.1 200 OK\r\n"
                         "Content-Type: application/octet-stream\r\n"
                         "Content-Length: " +
                             std::to_string(c.down) + "\r\n\r\n");
    }
    if (path.compare(0, 7, "/upload") == 0) {
      c.body_length = header_number(head, "\r\nContent-Length:");
      c.body = c.body_length - behind;
      c.uploading = true;
      return take_body(c);
    }
    if (path.compare(0, 4, "/sse") == 0) {
      c.every = std::chrono::milliseconds(number(path, "every="));
      c.next_event = Clock::now() + c.every;
      c.stream_end =
          Clock::now() + std::chrono::milliseconds(number(path, "for="));
      streams_++;
      return send_all(c, "HTTP/1.1 200 OK\r\n"
                         "Content-Type: text/event-stream\r\n"
                         "Cache-Control: no-store\r\n"
                         "Transfer-Encoding: chunked\r\n\r\n" +
                             event());
    }
    return send_all(c, page_);
  }

  bool take_body(Connection &c) {
    while (c.body > 0) {
      // MSG_TRUNC discards the bytes without copying them to us.
      const auto n =
          recv(c.fd, nullptr, static_cast<size_t>(std::min(c.body, 1LL << 22)),
               MSG_TRUNC);
      if (n <= 0) { return n < 0 && errno == EAGAIN; }
      c.body -= n;
    }
    c.uploading = false;
    const auto text = std::to_string(c.body_length) + "\n";
    return send_all(c, "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n"
                       "Content-Length: " +
                           std::to_string(text.size()) + "\r\n\r\n" + text);
  }

  bool send_all(Connection &c, const std::string &data) {
    if (c.out.empty()) {
      // MSG_MORE keeps a download's head and first bytes in one segment.
      const auto n =
          send(c.fd, data.data(), data.size(),
               MSG_NOSIGNAL | (c.down > 0 ? static_cast<int>(MSG_MORE) : 0));
      if (n < 0 && errno != EAGAIN) { return false; }
      if (n == static_cast<ssize_t>(data.size())) { return flush(c); }
      c.out.append(data, static_cast<size_t>(std::max<ssize_t>(n, 0)));
    } else {
      c.out += data;
    }
    return flush(c);
  }

  bool flush(Connection &c) {
    while (!c.out.empty()) {
      const auto n = send(c.fd, c.out.data(), c.out.size(), MSG_NOSIGNAL);
      if (n < 0) { return errno == EAGAIN && wait_for_room(c, true); }
      c.out.erase(0, static_cast<size_t>(n));
    }
    while (c.down > 0) {
      off_t offset = 0;
      const auto n =
          sendfile(c.fd, block_, &offset,
                   static_cast<size_t>(std::min<long long>(c.down, kBlock)));
      if (n < 0) { return errno == EAGAIN && wait_for_room(c, true); }
      c.down -= n;
    }
    return wait_for_room(c, false);
  }

  bool wait_for_room(Connection &c, bool wanted) const {
    if (c.wants_write != wanted) {
      c.wants_write = wanted;
      watch(EPOLL_CTL_MOD, c.fd, wanted ? EPOLLIN | EPOLLOUT : EPOLLIN);
    }
    return true;
  }

  static std::string event() {
    const std::string text =
        "data: " + std::to_string(Clock::now().time_since_epoch().count()) +
        "\n\n";
    char size[16];
    std::snprintf(size, sizeof size, "%zx\r\n", text.size());
    return size + text + "\r\n";
  }

  void send_events() {
    const auto now = Clock::now();
    for (auto &c : connections_) {
      if (!c || c->every.count() == 0) { continue; }
      if (now >= c->stream_end) {
        c->every = std::chrono::milliseconds(0);
        streams_--;
        if (!send_all(*c, "0\r\n\r\n")) { drop(c); }
      } else if (now >= c->next_event) {
        c->next_event += c->every;
        if (!send_all(*c, event())) { drop(c); }
      }
    }
  }

  static long long number(const std::string &text, const char *after) {
    const auto at = text.find(after);
    if (at == std::string::npos) { return 1000; }
    return std::atoll(text.c_str() + at + std::strlen(after));
  }

  static long long header_number(const std::string &head, const char *name) {
    const auto *at = strcasestr(head.c_str(), name);
    return at ? std::atoll(at + std::strlen(name)) : 0;
  }

  int listener_ = -1;
  int epoll_ = -1;
  int block_ = -1;
  int streams_ = 0;
  Clock::time_point ready_at_;
  std::chrono::milliseconds page_time_ = from_env("BENCH_PAGE_MS");
  std::string page_;
  std::vector<std::unique_ptr<Connection>> connections_; // by descriptor
};

// A program that boots makes no progress while it is frozen; a sleep would.
void boot(std::chrono::nanoseconds left) {
  constexpr std::chrono::nanoseconds slice = std::chrono::milliseconds{20};
  while (left.count() > 0) {
    const auto start = Clock::now();
    std::this_thread::sleep_for(std::min(left, slice));
    const auto slept = Clock::now() - start;
    left -= slept < 5 * slice ? slept : slice;
  }
}

} // namespace

int main() {
  const auto *port = std::getenv("PORT");
  if (!port) {
    std::fputs("target: PORT is not set\n", stderr);
    return 2;
  }
  rlimit files{};
  getrlimit(RLIMIT_NOFILE, &files);
  files.rlim_cur = files.rlim_max;
  setrlimit(RLIMIT_NOFILE, &files);
  std::signal(SIGPIPE, SIG_IGN);
  boot(from_env("BENCH_BOOT_MS"));
  Target(std::atoi(port)).run();
}
