// Shared by all tests: raw sockets at both ends of the proxy, so that a test
// sees the exact bytes, and processes with an exact environment. Every wait has
// a deadline and throws when it has passed, which fails the test.

#ifndef WARMPROXY_TESTS_SUPPORT_HPP
#define WARMPROXY_TESTS_SUPPORT_HPP

#include "../warmproxy.hpp"
#include "bytes.hpp"

#include <arpa/inet.h>
#include <dirent.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cctype>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

extern char **environ;

namespace support {

using Clock = std::chrono::steady_clock;
using Milliseconds = std::chrono::milliseconds;

// The default deadline: longer than anything takes under a sanitizer on a busy
// machine. No test measures time by it.
constexpr Milliseconds patience{20000};

// Whether a sanitizer is on: memory and descriptors are then not compared.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool sanitized = true;
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
constexpr bool sanitized = true;
#else
constexpr bool sanitized = false;
#endif
#else
constexpr bool sanitized = false;
#endif

// Whether the refinements that only Linux has are compiled in.
#ifdef __linux__
constexpr bool on_linux = true;
#else
constexpr bool on_linux = false;
#endif

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

[[noreturn]] inline void fail(const std::string &what) {
  throw Error(what + ": " + std::strerror(errno));
}

// Waits until `condition()` is true. False if it is not at the deadline.
template <class Condition>
bool wait_for(Condition condition, Milliseconds deadline = patience) {
  const auto until = Clock::now() + deadline;
  for (;;) {
    if (condition()) { return true; }
    if (Clock::now() >= until) { return false; }
    poll(nullptr, 0, 1);
  }
}

inline bool same_name(std::string_view a, std::string_view b) {
  return a.size() == b.size() &&
         std::equal(a.begin(), a.end(), b.begin(), [](char x, char y) {
           return std::tolower(static_cast<unsigned char>(x)) ==
                  std::tolower(static_cast<unsigned char>(y));
         });
}

// ---- heads -----------------------------------------------------------------

using Headers = std::vector<std::pair<std::string, std::string>>;

// The header lines of a head in their order, values without the blanks around
// them.
inline Headers headers_of(std::string_view head) {
  Headers headers;
  auto at = head.find("\r\n");
  while (at != std::string_view::npos) {
    at += 2;
    const auto end = head.find("\r\n", at);
    if (end == std::string_view::npos || end == at) { break; }
    const auto line = head.substr(at, end - at);
    const auto colon = line.find(':');
    if (colon != std::string_view::npos) {
      auto value = line.substr(colon + 1);
      while (!value.empty() &&
             (value.front() == ' ' || value.front() == '\t')) {
        value.remove_prefix(1);
      }
      while (!value.empty() && (value.back() == ' ' || value.back() == '\t')) {
        value.remove_suffix(1);
      }
      headers.emplace_back(line.substr(0, colon), value);
    }
    at = end;
  }
  return headers;
}

inline std::string header_of(const Headers &headers, std::string_view name) {
  for (const auto &h : headers) {
    if (same_name(h.first, name)) { return h.second; }
  }
  return {};
}

inline std::size_t count_of(const Headers &headers, std::string_view name) {
  return static_cast<std::size_t>(
      std::count_if(headers.begin(), headers.end(),
                    [&](const auto &h) { return same_name(h.first, name); }));
}

// The first value of a header in a raw head; "" if there is none.
inline std::string header_of(std::string_view head, std::string_view name) {
  return header_of(headers_of(head), name);
}

struct Response {
  int status = 0;        // 0: the connection ended before the head was complete
  std::string head;      // its exact bytes, with the empty line
  std::string body;      // without the chunks' framing
  std::string raw_body;  // as it came
  Headers headers;       // in their order
  std::string trailers;  // of a chunked body: the raw lines
  bool complete = false; // the body ended where its framing said

  std::string header(std::string_view name) const {
    return header_of(headers, name);
  }
  std::size_t count(std::string_view name) const {
    return count_of(headers, name);
  }
};

// ---- sockets ---------------------------------------------------------------

// Owns a connected socket; every read and write has a deadline.
class Socket {
public:
  explicit Socket(int fd = -1) : fd_(fd) {
    if (fd_ >= 0) {
      const int on = 1;
      setsockopt(fd_, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
    }
  }
  Socket(const Socket &) = delete;
  Socket &operator=(const Socket &) = delete;
  virtual ~Socket() { close(); }

  int fd() const { return fd_; }

  // Sends everything. False if the peer has closed; throws if it does not read.
  bool send(std::string_view data, Milliseconds deadline = patience) {
    const auto until = Clock::now() + deadline;
    while (!data.empty()) {
      const auto n =
          ::send(fd_, data.data(), data.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
      if (n > 0) {
        data.remove_prefix(static_cast<std::size_t>(n));
      } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
        if (!wait(POLLOUT, until)) {
          throw Error("send: the peer does not read");
        }
      } else if (errno != EINTR) {
        return false;
      }
    }
    return true;
  }

  // Sends the first n bytes of the sequence in bytes.hpp.
  bool send_generated(std::uint64_t n, Milliseconds deadline = patience) {
    std::string block;
    for (std::uint64_t at = 0; at < n; at += block.size()) {
      block.resize(
          static_cast<std::size_t>(std::min<std::uint64_t>(65536, n - at)));
      bytes::fill(&block[0], block.size(), at);
      if (!send(block, deadline)) { return false; }
    }
    return true;
  }

  void shutdown_write() { ::shutdown(fd_, SHUT_WR); }

  virtual void close() {
    if (fd_ >= 0) { ::close(fd_); }
    fd_ = -1;
  }

  // Closes with RST instead of FIN.
  void reset() {
    struct linger hard = {1, 0};
    setsockopt(fd_, SOL_SOCKET, SO_LINGER, &hard, sizeof(hard));
    close();
  }

  // What has been received already, or the next bytes; "" at the end
  // (was_reset() says which kind).
  std::string read_some(Milliseconds deadline = patience) {
    if (buffer_.empty()) { receive(Clock::now() + deadline, "bytes"); }
    return take(buffer_.size());
  }

  // Exactly n bytes. Throws if the peer ends before.
  std::string read_exact(std::size_t n, Milliseconds deadline = patience) {
    const auto until = Clock::now() + deadline;
    while (buffer_.size() < n) {
      if (!receive(until, std::to_string(n) + " bytes")) {
        throw Error("the peer ended after " + std::to_string(buffer_.size()) +
                    " of " + std::to_string(n) + " bytes");
      }
    }
    return take(n);
  }

  // Everything up to and including `mark`. Throws if the peer ends before.
  std::string read_until(std::string_view mark,
                         Milliseconds deadline = patience) {
    std::string text;
    if (!read_up_to(mark, Clock::now() + deadline, text)) {
      throw Error("the peer ended before \"" + std::string(mark) +
                  "\", after \"" + text.substr(0, 200) + "\"");
    }
    return text;
  }

  // Everything until the peer ends.
  std::string read_to_end(Milliseconds deadline = patience) {
    const auto until = Clock::now() + deadline;
    while (receive(until, "the end")) {}
    return take(buffer_.size());
  }

  // Reads up to n generated bytes without storing them and returns their
  // number. Throws at the first wrong one.
  std::uint64_t verify_generated(std::uint64_t n,
                                 Milliseconds deadline = patience) {
    std::uint64_t at = 0;
    while (at < n) {
      if (buffer_.empty() &&
          !receive(Clock::now() + deadline, "generated bytes")) {
        break;
      }
      const auto step = static_cast<std::size_t>(
          std::min<std::uint64_t>(buffer_.size(), n - at));
      if (!bytes::match(buffer_.data(), step, at)) {
        throw Error("wrong bytes at or after " + std::to_string(at));
      }
      take(step);
      at += step;
    }
    return at;
  }

  // Whether there are bytes, or the end, within `deadline`.
  bool readable(Milliseconds deadline = Milliseconds(0)) {
    return !buffer_.empty() || wait(POLLIN, Clock::now() + deadline);
  }

  // Whether the peer ends without sending more.
  bool at_end(Milliseconds deadline = patience) {
    return buffer_.empty() && !receive(Clock::now() + deadline, "the end");
  }

  bool was_reset() const { return reset_; }

protected:
  // Called once with every byte received.
  virtual void received(std::string_view) {}

  // False if the peer ended before; `text` then holds what was received.
  bool read_up_to(std::string_view mark, Clock::time_point until,
                  std::string &text) {
    std::size_t searched = 0;
    for (;;) {
      const auto found = buffer_.find(mark, searched);
      if (found != std::string::npos) {
        text = take(found + mark.size());
        return true;
      }
      searched =
          buffer_.size() < mark.size() ? 0 : buffer_.size() - mark.size();
      if (!receive(until, mark)) {
        text = take(buffer_.size());
        return false;
      }
    }
  }

  // Appends received bytes to the buffer. False at the end.
  bool receive(Clock::time_point until, std::string_view awaited) {
    if (fd_ < 0) { return false; }
    char block[65536];
    for (;;) {
      const auto n = ::recv(fd_, block, sizeof(block), MSG_DONTWAIT);
      if (n > 0) {
        buffer_.append(block, static_cast<std::size_t>(n));
        received({block, static_cast<std::size_t>(n)});
        return true;
      }
      if (n == 0) { return false; }
      if (errno == EAGAIN || errno == EWOULDBLOCK) {
        if (!wait(POLLIN, until)) {
          throw Error("timed out waiting for \"" + std::string(awaited) +
                      "\", after \"" + buffer_.substr(0, 200) + "\"");
        }
      } else if (errno != EINTR) {
        reset_ = true;
        return false;
      }
    }
  }

  std::string take(std::size_t n) {
    if (n == buffer_.size()) { return std::exchange(buffer_, {}); }
    auto text = buffer_.substr(0, n);
    buffer_.erase(0, n);
    return text;
  }

  bool wait(short events, Clock::time_point until) {
    for (;;) {
      const auto left = std::chrono::duration_cast<Milliseconds>(
          until - Clock::now() + Milliseconds(1));
      pollfd p = {fd_, events, 0};
      const auto n =
          poll(&p, 1, static_cast<int>(std::max<long>(0, left.count())));
      if (n > 0) { return true; }
      if (n == 0 || errno != EINTR) { return false; }
    }
  }

  // Reads the body that `headers` announce. False if it was truncated.
  bool read_body(const Headers &headers, bool until_close,
                 Clock::time_point until, std::string &raw, std::string &body,
                 std::string &trailers) {
    const auto left = [&] {
      return std::chrono::duration_cast<Milliseconds>(until - Clock::now());
    };
    if (count_of(headers, "Transfer-Encoding") > 0) {
      for (;;) {
        std::string line;
        const auto whole = read_up_to("\r\n", until, line);
        raw += line;
        if (!whole) { return false; }
        const auto size = std::strtoull(line.c_str(), nullptr, 16);
        if (size == 0) { break; }
        std::string chunk;
        while (chunk.size() < size + 2) {
          if (buffer_.empty() && !receive(until, "a chunk")) {
            raw += chunk;
            body += chunk.substr(0, static_cast<std::size_t>(size));
            return false;
          }
          chunk +=
              take(std::min(buffer_.size(),
                            static_cast<std::size_t>(size) + 2 - chunk.size()));
        }
        raw += chunk;
        body.append(chunk, 0, static_cast<std::size_t>(size));
      }
      for (;;) {
        std::string line;
        const auto whole = read_up_to("\r\n", until, line);
        raw += line;
        if (!whole) { return false; }
        if (line == "\r\n") { return true; }
        trailers += line;
      }
    }
    if (count_of(headers, "Content-Length") > 0) {
      const auto size = static_cast<std::size_t>(std::strtoull(
          header_of(headers, "Content-Length").c_str(), nullptr, 10));
      while (body.size() < size) {
        if (buffer_.empty() && !receive(until, "the body")) { break; }
        body += take(std::min(buffer_.size(), size - body.size()));
      }
      raw = body;
      return body.size() == size;
    }
    if (until_close) {
      body = read_to_end(left());
      raw = body;
      return !reset_;
    }
    return true;
  }

  int fd_;
  std::string buffer_;
  bool reset_ = false;
};

inline int connect_to(const std::string &host, int port) {
  sockaddr_storage address{};
  socklen_t size;
  if (host.find(':') != std::string::npos) {
    auto &a = reinterpret_cast<sockaddr_in6 &>(address);
    a.sin6_family = AF_INET6;
    a.sin6_port = htons(static_cast<std::uint16_t>(port));
    inet_pton(AF_INET6, host.c_str(), &a.sin6_addr);
    size = sizeof(a);
  } else {
    auto &a = reinterpret_cast<sockaddr_in &>(address);
    a.sin_family = AF_INET;
    a.sin_port = htons(static_cast<std::uint16_t>(port));
    inet_pton(AF_INET, host.c_str(), &a.sin_addr);
    size = sizeof(a);
  }
  const int fd = socket(address.ss_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (fd < 0) { fail("socket"); }
  if (connect(fd, reinterpret_cast<sockaddr *>(&address), size) != 0) {
    const auto why = errno;
    ::close(fd);
    errno = why;
    fail("connect to port " + std::to_string(port));
  }
  return fd;
}

// A client that sends exactly the bytes that it is given.
class RawClient : public Socket {
public:
  explicit RawClient(int port, const std::string &host = "127.0.0.1")
      : Socket(connect_to(host, port)) {}

  // Reads the next response with its body. An interim response (1xx) is
  // returned on its own; the bytes after a 101 are left to the read functions.
  // `to_head`: the request was HEAD, so there is no body.
  Response read_response(bool to_head = false,
                         Milliseconds deadline = patience) {
    auto response = read_response_head(deadline);
    if (response.status == 0) { return response; }
    if (to_head || response.status < 200 || response.status == 204 ||
        response.status == 304) {
      response.complete = true;
    } else {
      response.complete =
          read_body(response.headers, true, Clock::now() + deadline,
                    response.raw_body, response.body, response.trailers);
    }
    return response;
  }

  // Reads the head only, for bodies that the test reads in pieces.
  Response read_response_head(Milliseconds deadline = patience) {
    Response response;
    if (!read_up_to("\r\n\r\n", Clock::now() + deadline, response.head)) {
      return response;
    }
    const auto blank = response.head.find(' ');
    if (response.head.compare(0, 5, "HTTP/") == 0 &&
        blank != std::string::npos) {
      response.status = std::atoi(response.head.c_str() + blank);
    }
    response.headers = headers_of(response.head);
    return response;
  }

  // Sends a request and reads its response.
  Response exchange(std::string_view raw_request,
                    Milliseconds deadline = patience) {
    send(raw_request, deadline);
    return read_response(raw_request.substr(0, 5) == "HEAD ", deadline);
  }

  // `extra`: whole header lines, each with its CRLF.
  Response get(const std::string &target = "/", const std::string &extra = "",
               Milliseconds deadline = patience) {
    return exchange("GET " + target + " HTTP/1.1\r\nHost: test\r\n" + extra +
                        "\r\n",
                    deadline);
  }

  Response post(const std::string &target, const std::string &body,
                const std::string &extra = "",
                Milliseconds deadline = patience) {
    return exchange("POST " + target + " HTTP/1.1\r\nHost: test\r\n" +
                        "Content-Length: " + std::to_string(body.size()) +
                        "\r\n" + extra + "\r\n" + body,
                    deadline);
  }
};

// One request on a connection of its own.
inline Response get(int port, const std::string &target = "/",
                    const std::string &extra = "",
                    Milliseconds deadline = patience) {
  return RawClient(port).get(target, extra, deadline);
}
inline Response exchange(int port, std::string_view raw_request,
                         Milliseconds deadline = patience) {
  return RawClient(port).exchange(raw_request, deadline);
}

// ---- a target in the test's process ----------------------------------------

class ScriptedTarget;

// A connection as the target sees it.
class TargetConnection : public Socket {
public:
  TargetConnection(ScriptedTarget &target, int fd, std::size_t number)
      : Socket(fd), target_(target), number_(number) {}

  // The exact bytes of the next request head, with the empty line; "" when the
  // proxy has closed the connection.
  std::string read_head(Milliseconds deadline = std::chrono::minutes(10)) {
    std::string head;
    if (!read_up_to("\r\n\r\n", Clock::now() + deadline, head)) { return {}; }
    note_head(head);
    return head;
  }

  // The raw body that `head` announces: chunks with their framing.
  std::string read_body(const std::string &head,
                        Milliseconds deadline = patience) {
    std::string raw, body, trailers;
    Socket::read_body(headers_of(head), false, Clock::now() + deadline, raw,
                      body, trailers);
    note_body(raw);
    return raw;
  }

  std::size_t number() const { return number_; } // of the connection, from 0

  void close() override;
  ~TargetConnection() override { close(); }

private:
  void received(std::string_view data) override;
  void note_head(const std::string &head);
  void note_body(const std::string &raw);

  ScriptedTarget &target_;
  std::size_t number_;
};

// Listens on a free port and runs `handler` for each connection in a thread of
// its own; the connection is closed when the handler returns. One connection
// may never carry a request: the readiness probe's. The destructor shuts down
// open connections and joins the handlers, so a handler must not wait for
// anything else by then.
class ScriptedTarget {
public:
  using Handler = std::function<void(TargetConnection &)>;

  struct Request {
    std::size_t connection; // number of the connection it came on
    std::string head;       // exact bytes
    std::string body;       // raw, what read_body() has read
  };

  explicit ScriptedTarget(Handler handler)
      : handler_(std::move(handler)),
        listener_(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof(address);
    if (listener_ < 0 ||
        bind(listener_, reinterpret_cast<sockaddr *>(&address), size) != 0 ||
        listen(listener_, 1024) != 0 ||
        getsockname(listener_, reinterpret_cast<sockaddr *>(&address), &size) !=
            0) {
      fail("a scripted target");
    }
    port_ = ntohs(address.sin_port);
    acceptor_ = std::thread([this] { accept_all(); });
  }
  ScriptedTarget(const ScriptedTarget &) = delete;
  ScriptedTarget &operator=(const ScriptedTarget &) = delete;

  ~ScriptedTarget() {
    stopping_ = true;
    ::shutdown(listener_, SHUT_RDWR); // wakes accept
    acceptor_.join();
    ::close(listener_);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      for (auto fd : open_) {
        ::shutdown(fd, SHUT_RDWR);
      }
    }
    for (auto &thread : threads_) {
      thread.join();
    }
  }

  int port() const { return port_; }

  // Snapshots, in the order of arrival.
  std::vector<Request> requests() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return requests_;
  }
  std::size_t accepted() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return received_.size();
  }
  std::size_t open() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return open_.size();
  }
  // All bytes received on a connection, recorded up to 64 MB.
  std::string received(std::size_t connection) const {
    std::lock_guard<std::mutex> lock(mutex_);
    return received_.at(connection);
  }
  std::string received() const {
    std::lock_guard<std::mutex> lock(mutex_);
    std::string all;
    for (const auto &r : received_) {
      all += r;
    }
    return all;
  }
  // The exceptions of the handlers.
  std::vector<std::string> errors() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return errors_;
  }

  // Waits for the n-th request.
  Request request(std::size_t n = 0, Milliseconds deadline = patience) const {
    if (!wait_for([&] { return requests().size() > n; }, deadline)) {
      throw Error("the target received no request number " + std::to_string(n));
    }
    return requests()[n];
  }

private:
  friend class TargetConnection;

  void accept_all() {
    while (!stopping_) {
      const int fd = accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC);
      if (fd < 0) {
        if (!stopping_) { poll(nullptr, 0, 1); }
        continue;
      }
      std::lock_guard<std::mutex> lock(mutex_);
      const auto number = received_.size();
      received_.emplace_back();
      open_.push_back(fd);
      threads_.emplace_back([this, fd, number] {
        TargetConnection connection(*this, fd, number);
        try {
          handler_(connection);
        } catch (const std::exception &e) { note_error(e.what()); }
      });
    }
  }

  void note_error(const std::string &what) {
    std::lock_guard<std::mutex> lock(mutex_);
    errors_.push_back(what);
  }

  const Handler handler_;
  const int listener_;
  int port_ = 0;
  std::atomic<bool> stopping_{false};
  std::thread acceptor_;
  std::list<std::thread> threads_;

  mutable std::mutex mutex_;
  std::vector<std::string> received_; // one for each connection
  std::vector<int> open_;
  std::vector<Request> requests_;
  std::vector<std::string> errors_;
};

inline void TargetConnection::close() {
  if (fd_ < 0) { return; }
  std::lock_guard<std::mutex> lock(target_.mutex_);
  auto &open = target_.open_;
  open.erase(std::remove(open.begin(), open.end(), fd_), open.end());
  Socket::close();
}
inline void TargetConnection::received(std::string_view data) {
  std::lock_guard<std::mutex> lock(target_.mutex_);
  auto &all = target_.received_[number_];
  if (all.size() < (64u << 20)) { all.append(data); }
}
inline void TargetConnection::note_head(const std::string &head) {
  std::lock_guard<std::mutex> lock(target_.mutex_);
  target_.requests_.push_back({number_, head, {}});
}
inline void TargetConnection::note_body(const std::string &raw) {
  std::lock_guard<std::mutex> lock(target_.mutex_);
  auto &all = target_.requests_;
  for (auto r = all.rbegin(); r != all.rend(); ++r) {
    if (r->connection == number_) {
      r->body += raw;
      return;
    }
  }
}

// A handler that reads each request with its body, sends
// `respond(head, raw_body)`, and keeps the connection open.
inline ScriptedTarget::Handler answering_with(
    std::function<std::string(const std::string &, const std::string &)>
        respond) {
  return [respond = std::move(respond)](TargetConnection &c) {
    for (auto head = c.read_head(); !head.empty(); head = c.read_head()) {
      const auto body = c.read_body(head);
      if (!c.send(respond(head, body))) { return; }
    }
  };
}

// A handler that sends back each request's body as the raw response. After a
// request for "/close" it closes the connection. See dictate().
inline ScriptedTarget::Handler dictated() {
  return [](TargetConnection &c) {
    for (auto head = c.read_head(); !head.empty(); head = c.read_head()) {
      if (!c.send(c.read_body(head))) { return; }
      if (head.find(" /close ") != std::string::npos) { return; }
    }
  };
}
inline std::string dictate(std::string_view raw_response,
                           const std::string &method = "GET",
                           const std::string &target = "/") {
  return method + " " + target + " HTTP/1.1\r\nHost: test\r\nContent-Length: " +
         std::to_string(raw_response.size()) + "\r\n\r\n" +
         std::string(raw_response);
}

// A handler that sends the same raw response to every request.
inline ScriptedTarget::Handler answering(std::string raw_response) {
  return answering_with(
      [raw_response = std::move(raw_response)](
          const std::string &, const std::string &) { return raw_response; });
}

// A complete 200 response. `extra`: whole header lines, each with its CRLF.
inline std::string ok(const std::string &body = "ok",
                      const std::string &extra = "") {
  return "HTTP/1.1 200 OK\r\n" + extra +
         "Content-Length: " + std::to_string(body.size()) + "\r\n\r\n" + body;
}

// Lets a handler wait for the test, or the other way round.
class Gate {
public:
  void open() {
    std::lock_guard<std::mutex> lock(mutex_);
    open_ = true;
    changed_.notify_all();
  }
  void wait(Milliseconds deadline = patience) {
    std::unique_lock<std::mutex> lock(mutex_);
    if (!changed_.wait_for(lock, deadline, [&] { return open_; })) {
      throw Error("the gate was not opened");
    }
  }

private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool open_ = false;
};

// ---- files, ports, processes -----------------------------------------------

// A directory that is removed with its contents.
class TemporaryDirectory {
public:
  TemporaryDirectory() {
    std::string name = "/tmp/warmproxy-test-XXXXXX";
    if (!mkdtemp(&name[0])) { fail("mkdtemp"); }
    path_ = name;
  }
  TemporaryDirectory(const TemporaryDirectory &) = delete;
  TemporaryDirectory &operator=(const TemporaryDirectory &) = delete;
  ~TemporaryDirectory() { remove(path_); }

  const std::string &path() const { return path_; }
  std::string operator/(const std::string &name) const {
    return path_ + "/" + name;
  }

private:
  static void remove(const std::string &path) {
    if (auto *dir = opendir(path.c_str())) {
      while (auto *entry = readdir(dir)) {
        const std::string name = entry->d_name;
        if (name != "." && name != "..") { remove(path + "/" + name); }
      }
      closedir(dir);
      rmdir(path.c_str());
    } else {
      unlink(path.c_str());
    }
  }

  std::string path_;
};

inline std::string read_file(const std::string &path) {
  std::ifstream in(path, std::ios::binary);
  std::ostringstream out;
  out << in.rdbuf();
  return out.str();
}

inline void write_file(const std::string &path, std::string_view text) {
  std::ofstream out(path, std::ios::binary);
  out << text;
  if (!out.flush()) { fail("write " + path); }
}

inline std::vector<std::string> lines_of(const std::string &text) {
  std::vector<std::string> lines;
  std::istringstream in(text);
  for (std::string line; std::getline(in, line);) {
    lines.push_back(line);
  }
  return lines;
}

// A free port; another process may still take it.
inline int free_port() {
  const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof(address);
  if (fd < 0 || bind(fd, reinterpret_cast<sockaddr *>(&address), size) != 0 ||
      getsockname(fd, reinterpret_cast<sockaddr *>(&address), &size) != 0) {
    fail("free_port");
  }
  ::close(fd);
  return ntohs(address.sin_port);
}

// Whether a process listens on the port, without connecting to it.
inline bool listening(int port) {
  for (const auto *table : {"/proc/net/tcp", "/proc/net/tcp6"}) {
    for (const auto &line : lines_of(read_file(table))) {
      std::istringstream in(line);
      std::string number, local, remote, state;
      in >> number >> local >> remote >> state;
      const auto colon = local.rfind(':');
      if (state == "0A" && colon != std::string::npos &&
          std::strtol(local.c_str() + colon + 1, nullptr, 16) == port) {
        return true;
      }
    }
  }
  return false;
}

inline std::string proc_file(pid_t pid, const char *name) {
  return "/proc/" + std::to_string(pid) + "/" + name;
}

// A number from /proc/PID/status; 0 if the process has ended.
inline long proc_status(pid_t pid, const std::string &field) {
  for (const auto &line : lines_of(read_file(proc_file(pid, "status")))) {
    if (line.compare(0, field.size() + 1, field + ":") == 0) {
      return std::atol(line.c_str() + field.size() + 1);
    }
  }
  return 0;
}
inline long rss_kb(pid_t pid) { return proc_status(pid, "VmRSS"); }
inline long peak_rss_kb(pid_t pid) { return proc_status(pid, "VmHWM"); }
inline long threads(pid_t pid) { return proc_status(pid, "Threads"); }

inline std::size_t open_fds(pid_t pid) {
  auto *dir = opendir(proc_file(pid, "fd").c_str());
  if (!dir) { return 0; }
  std::size_t n = 0;
  while (auto *entry = readdir(dir)) {
    if (entry->d_name[0] != '.') { ++n; }
  }
  closedir(dir);
  return pid == getpid() ? n - 1 : n; // without that of opendir()
}

struct ProcessInfo {
  pid_t pid;
  char state;
  pid_t parent;
  pid_t group;
};

// All running processes, without zombies.
inline std::vector<ProcessInfo> processes() {
  std::vector<ProcessInfo> all;
  auto *dir = opendir("/proc");
  if (!dir) { fail("/proc"); }
  while (auto *entry = readdir(dir)) {
    const auto pid = static_cast<pid_t>(std::atol(entry->d_name));
    if (pid <= 0) { continue; }
    const auto stat = read_file(proc_file(pid, "stat"));
    const auto name_end = stat.rfind(')'); // the name may hold anything
    if (name_end == std::string::npos) { continue; }
    ProcessInfo info{pid, 0, 0, 0};
    std::istringstream in(stat.substr(name_end + 1));
    in >> info.state >> info.parent >> info.group;
    if (info.state != 'Z' && info.state != 'X') { all.push_back(info); }
  }
  closedir(dir);
  return all;
}

inline std::vector<pid_t> children_in_group(pid_t group) {
  std::vector<pid_t> pids;
  for (const auto &p : processes()) {
    if (p.group == group) { pids.push_back(p.pid); }
  }
  return pids;
}

inline std::vector<pid_t> children_of(pid_t parent) {
  std::vector<pid_t> pids;
  for (const auto &p : processes()) {
    if (p.parent == parent) { pids.push_back(p.pid); }
  }
  return pids;
}

// The processes that were started with NAME=VALUE in their environment,
// whatever their group or session.
inline std::vector<pid_t> processes_with(const std::string &name_value) {
  std::vector<pid_t> pids;
  for (const auto &p : processes()) {
    const auto environment =
        '\0' + read_file(proc_file(p.pid, "environ")) + '\0';
    if (environment.find('\0' + name_value + '\0') != std::string::npos) {
      pids.push_back(p.pid);
    }
  }
  return pids;
}

using Environment = std::map<std::string, std::string>;

// Runs a program with exactly this environment in a process group of its own
// and records what it prints. The destructor kills it if it still runs.
class Process {
public:
  Process(const std::string &program, const std::vector<std::string> &args,
          const Environment &environment = {},
          const std::string &directory = "")
      : out_(temporary_file()), err_(temporary_file()) {
    std::vector<std::string> variables;
    for (const auto &v : environment) {
      variables.push_back(v.first + "=" + v.second);
    }
    std::vector<char *> argv{const_cast<char *>(program.c_str())}, envp;
    for (const auto &a : args) {
      argv.push_back(const_cast<char *>(a.c_str()));
    }
    for (const auto &v : variables) {
      envp.push_back(const_cast<char *>(v.c_str()));
    }
    argv.push_back(nullptr);
    envp.push_back(nullptr);

    posix_spawn_file_actions_t files;
    posix_spawn_file_actions_init(&files);
    posix_spawn_file_actions_addopen(&files, 0, "/dev/null", O_RDONLY, 0);
    posix_spawn_file_actions_adddup2(&files, out_, 1);
    posix_spawn_file_actions_adddup2(&files, err_, 2);
    if (!directory.empty()) {
      posix_spawn_file_actions_addchdir_np(&files, directory.c_str());
    }
    posix_spawnattr_t how;
    posix_spawnattr_init(&how);
    sigset_t none, ignored;
    sigemptyset(&none);
    sigemptyset(&ignored);
    // httplib ignores SIGPIPE in the test's process; nohup and background jobs
    // of a shell the others.
    for (const int number : {SIGPIPE, SIGHUP, SIGINT, SIGQUIT}) {
      sigaddset(&ignored, number);
    }
    posix_spawnattr_setsigmask(&how, &none);
    posix_spawnattr_setsigdefault(&how, &ignored);
    posix_spawnattr_setpgroup(&how, 0);
    posix_spawnattr_setflags(&how, POSIX_SPAWN_SETSIGMASK |
                                       POSIX_SPAWN_SETSIGDEF |
                                       POSIX_SPAWN_SETPGROUP);
    const auto result = posix_spawnp(&pid_, program.c_str(), &files, &how,
                                     argv.data(), envp.data());
    posix_spawnattr_destroy(&how);
    posix_spawn_file_actions_destroy(&files);
    if (result != 0) {
      ::close(out_);
      ::close(err_);
      errno = result;
      fail("spawn " + program);
    }
  }
  Process(const Process &) = delete;
  Process &operator=(const Process &) = delete;

  ~Process() {
    if (running()) {
      signal(SIGKILL);
      waitpid(pid_, nullptr, 0);
    }
    ::close(out_);
    ::close(err_);
  }

  pid_t pid() const { return pid_; }
  void signal(int number) {
    if (running()) { kill(pid_, number); }
  }

  bool running() {
    if (!ended_ && waitpid(pid_, &status_, WNOHANG) == pid_) { ended_ = true; }
    return !ended_;
  }

  // Waits for the end and returns the exit status, or 128 + the signal.
  int wait(Milliseconds deadline = patience) {
    if (!wait_for([&] { return !running(); }, deadline)) {
      throw Error("process " + std::to_string(pid_) +
                  " does not end; it printed: " + err());
    }
    return WIFEXITED(status_) ? WEXITSTATUS(status_) : 128 + WTERMSIG(status_);
  }

  // What the program and its children have printed so far.
  std::string out() const { return contents(out_); }
  std::string err() const { return contents(err_); }
  bool printed(const std::string &text, Milliseconds deadline = patience) {
    return wait_for(
        [&] {
          return err().find(text) != std::string::npos ||
                 out().find(text) != std::string::npos;
        },
        deadline);
  }

private:
  // Not a pipe: a process that outlives the program could keep it open.
  static int temporary_file() {
    std::string name = "/tmp/warmproxy-test-XXXXXX";
    const int fd = mkostemp(&name[0], O_CLOEXEC | O_APPEND);
    if (fd < 0) { fail("mkostemp"); }
    unlink(name.c_str());
    return fd;
  }

  static std::string contents(int fd) {
    std::string text;
    char block[65536];
    ssize_t n;
    while ((n = pread(fd, block, sizeof(block),
                      static_cast<off_t>(text.size()))) > 0) {
      text.append(block, static_cast<std::size_t>(n));
    }
    return text;
  }

  int out_;
  int err_;
  pid_t pid_ = -1;
  int status_ = 0;
  bool ended_ = false;
};

// ---- built programs --------------------------------------------------------

inline std::string environment_or(const char *name, const char *otherwise) {
  const auto *value = std::getenv(name);
  return value && *value ? value : otherwise;
}

// The directory of `fake`; `warmproxy` and `demo` are one above.
inline std::string test_directory() {
  const auto name = environment_or("WARMPROXY_TEST_DIR", "build/tests");
  std::unique_ptr<char, decltype(&std::free)> path(
      realpath(name.c_str(), nullptr), &std::free);
  if (!path) { fail(name); }
  return path.get();
}
inline std::string built(const std::string &name) {
  return name == "fake" ? test_directory() + "/fake"
                        : test_directory() + "/../" + name;
}

// The size of large bodies.
inline std::uint64_t large_body() {
  return std::strtoull(
      environment_or("WARMPROXY_TEST_BYTES", "268435456").c_str(), nullptr, 10);
}

// Options that run tests/fake.cpp with `args` on a free port.
inline warmproxy::Options fake_target(std::vector<std::string> args = {}) {
  warmproxy::Options options;
  options.binary = built("fake");
  options.args = std::move(args);
  return options;
}

// Options that use a ScriptedTarget instead of starting a program.
inline warmproxy::Options attached(const ScriptedTarget &target) {
  warmproxy::Options options;
  options.binary = "/bin/false";
  options.target_port = target.port();
  options.health_path = "";
  return options;
}

// ---- the proxy -------------------------------------------------------------

// A proxy in the test's process, listening on a free port of 127.0.0.1.
class RunningProxy {
public:
  explicit RunningProxy(warmproxy::Options options,
                        const std::string &host = "127.0.0.1")
      : proxy_(logging(std::move(options))) {
    port_ = proxy_.bind_to_any_port(host);
    if (port_ <= 0) { throw Error("the proxy cannot bind"); }
    thread_ = std::thread([this] { drained_ = proxy_.listen_after_bind(); });
  }
  RunningProxy(const RunningProxy &) = delete;
  RunningProxy &operator=(const RunningProxy &) = delete;
  ~RunningProxy() { stop(); }

  int port() const { return port_; }
  warmproxy::Proxy &proxy() { return proxy_; }
  warmproxy::Status status() const { return proxy_.status(); }

  // Stops the proxy and returns the result of listen_after_bind().
  bool stop() {
    if (thread_.joinable()) {
      proxy_.stop();
      thread_.join();
    }
    return drained_;
  }

  std::vector<std::string> log_lines() const {
    std::lock_guard<std::mutex> lock(log_mutex_);
    return log_;
  }
  bool logged(const std::string &text, Milliseconds deadline = patience) const {
    return wait_for(
        [&] {
          for (const auto &line : log_lines()) {
            if (line.find(text) != std::string::npos) { return true; }
          }
          return false;
        },
        deadline);
  }

private:
  warmproxy::Options logging(warmproxy::Options options) {
    if (!options.log) {
      options.log = [this](std::string_view line) {
        std::lock_guard<std::mutex> lock(log_mutex_);
        log_.emplace_back(line);
      };
    }
    return options;
  }

  mutable std::mutex log_mutex_; // outlives the proxy, which logs until its end
  std::vector<std::string> log_;
  warmproxy::Proxy proxy_;
  int port_ = 0;
  bool drained_ = false;
  std::thread thread_;
};

// A ScriptedTarget and a proxy for which it is up, so that no request waits for
// a start, which would add Server-Timing to its response.
struct Stage {
  explicit Stage(ScriptedTarget::Handler handler)
      : Stage(std::move(handler), [](warmproxy::Options &) {}) {}
  template <class Change>
  Stage(ScriptedTarget::Handler handler, Change change)
      : target(std::move(handler)), proxy(changed(change)) {
    if (!wait_for([&] { return proxy.status().state == "up"; })) {
      throw Error("the proxy does not find the target up");
    }
  }

  int port() const { return proxy.port(); }
  // The latest request that reached the target.
  ScriptedTarget::Request last() const {
    const auto requests = target.requests();
    if (requests.empty()) { throw Error("no request reached the target"); }
    return requests.back();
  }

  ScriptedTarget target;
  RunningProxy proxy;

private:
  template <class Change> warmproxy::Options changed(Change change) const {
    auto options = attached(target);
    options.prewarm = true;
    change(options);
    return options;
  }
};

// A request head without the lines that warmproxy adds to each.
inline std::string without_forwarded(std::string_view head) {
  std::string rest;
  while (!head.empty()) {
    const auto end = std::min(head.find("\r\n"), head.size() - 2) + 2;
    if (head.substr(0, 12) != "X-Forwarded-") { rest += head.substr(0, end); }
    head.remove_prefix(end);
  }
  return rest;
}

// build/warmproxy with this environment and PATH, on 127.0.0.1 and by default a
// free port. The constructor waits until it listens.
class ServeProcess : public Process {
public:
  explicit ServeProcess(const Environment &environment = {},
                        bool await_listening = true)
      : ServeProcess(complete(environment), await_listening, 0) {}

  int port() const { return port_; }

private:
  ServeProcess(const Environment &environment, bool await_listening, int)
      : Process(built("warmproxy"), {}, environment),
        port_(std::atoi(environment.at("PORT").c_str())) {
    if (await_listening &&
        !wait_for([&] { return listening(port_) || !running(); })) {
      throw Error("warmproxy does not listen; it printed: " + err());
    }
    if (await_listening && !running()) {
      throw Error("warmproxy ended; it printed: " + err());
    }
  }

  static Environment complete(Environment environment) {
    environment.emplace("PATH", environment_or("PATH", "/usr/bin:/bin"));
    environment.emplace("HOST", "127.0.0.1");
    environment.emplace("PORT", std::to_string(free_port()));
    return environment;
  }

  int port_;
};

// The environment that makes build/warmproxy run tests/fake.cpp with `args`,
// which must not contain a quote.
inline Environment serve_fake(const std::vector<std::string> &args = {}) {
  std::string line;
  for (const auto &a : args) {
    line += "'" + a + "' ";
  }
  return {{"WARMPROXY_BINARY", built("fake")},
          {"WARMPROXY_ARGS", line},
          {"WARMPROXY_TARGET_PORT", "0"}};
}

} // namespace support

#endif
