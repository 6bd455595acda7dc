// A target for the tests. Its arguments say how it starts and ends, the request
// path says how it responds; --help lists both.

#include "bytes.hpp"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

extern char **environ;

namespace {

const char *const help = R"(fake [option]...
  --host ADDRESS       the address to listen on (127.0.0.1)
  --port N             the port to listen on ($PORT)
  --listen-after MS    listens after this time
  --ready-after MS     responds 503 for this time after it began to listen
  --exit-now CODE      exits at once
  --exit-after MS CODE exits after this time
  --never-listen       does nothing
  --never-answer       listens, accepts and reads, but does not respond
  --never-accept       listens, but does not accept
  --one-at-a-time      serves one connection at a time, one request on each
  --root-status N      responds to / with this status
  --root-delay MS      responds to / after this time
  --only-host NAME     closes connections on which another Host is named
  --also-listen A B    listens on a second free port from A to B ms after it
                       began to listen
  --log-mb N           prints N MB to stderr before it listens
  --daemonize          forks; the child serves, the parent exits
  --fork-worker        forks a child that ignores SIGTERM and does nothing
  --ignore-term        ignores SIGTERM
  --term-delay MS      exits with status 0 this time after SIGTERM
  --polite             on SIGTERM, listens no more, ends event streams and
                       tunnels, waits until all connections are closed and exits
                       with status 0; a second SIGTERM ends it at once
  --term-file PATH     appends "SIGTERM" for each, and "exit" at a polite exit
  --launcher           serves in a child, and passes SIGTERM on to it
  --backlog N          the backlog of listen(2)
  --count-file PATH    appends a line with its pid at each start
  --posts-file PATH    appends a line for each POST body: the text or its length
  --args-follow ...    the rest is only for /args
paths
  /                    a small page
  /pid /cwd /args /env of this process
  /connections         the number of connections accepted so far
  /fds /signals        open descriptors, blocked and ignored signals at start
  /echo                the request, head and body
  /write?NAME          writes a file in the working directory
  /bytes?n=N           N bytes (bytes.hpp) with Content-Length
  /chunked?n=N         the same in chunks
  /close?n=N           the same, delimited by close
  /upload              checks such bytes and responds with their number
  /sse?n=N&gate=PATH   an event; the others once the file PATH exists
  /slow?ms=N           responds after this time
  /stop-listening      refuses new connections from now on
  /crash               exits before the response
  /crash-mid           exits within the response
  /early413            refuses a body without reading it
  /ws                  101 to any Upgrade, then an echo
)";

using Clock = std::chrono::steady_clock;
using Milliseconds = std::chrono::milliseconds;

struct Settings {
  std::string host = "127.0.0.1";
  int port = 0;
  int listen_after = 0;
  int ready_after = 0;
  int backlog = 1024;
  bool never_listen = false;
  bool never_answer = false;
  bool never_accept = false;
  bool one_at_a_time = false;
  int root_status = 200;
  int root_delay = 0;
  long also_from = -1, also_until = 0;
  std::string only_host;
  bool daemonize = false;
  bool fork_worker = false;
  bool polite = false;
  long log_mb = 0;
  std::string count_file;
  std::string posts_file;
  std::string term_file;
  std::vector<std::string> args;
};

Settings settings;
Clock::time_point listening_since;
int listener = -1;
std::string inherited_fds;
std::string inherited_signals;
int term_pipe[2];
std::atomic<int> connections{0}; // accepted so far
std::atomic<int> open_connections{0};
std::atomic<bool> ending{false};
pid_t launched = 0;

[[noreturn]] void die(const std::string &what) {
  std::fprintf(stderr, "fake: %s: %s\n", what.c_str(), std::strerror(errno));
  std::exit(1);
}

void wait_ms(long ms) { std::this_thread::sleep_for(Milliseconds(ms)); }

// With O_APPEND, lines of several processes and threads never interleave.
void append_line(const std::string &path, const std::string &line) {
  const int fd =
      open(path.c_str(), O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0644);
  const auto text = line + "\n";
  if (fd < 0 || write(fd, text.data(), text.size()) < 0) { die(path); }
  close(fd);
}

std::string list_fds() {
  std::string text;
  for (int fd = 0; fd < 4096; ++fd) {
    struct stat s;
    if (fstat(fd, &s) == 0) { text += std::to_string(fd) + "\n"; }
  }
  return text;
}

std::string list_signals() {
  std::string blocked = "blocked:", ignored = "ignored:";
  sigset_t mask;
  sigprocmask(SIG_BLOCK, nullptr, &mask);
  for (int s = 1; s < NSIG; ++s) {
    struct sigaction action;
    if (sigismember(&mask, s) == 1) { blocked += " " + std::to_string(s); }
    if (sigaction(s, nullptr, &action) == 0 && action.sa_handler == SIG_IGN) {
      ignored += " " + std::to_string(s);
    }
  }
  return blocked + "\n" + ignored + "\n";
}

// ---- a connection ----------------------------------------------------------

struct Disconnected {}; // the peer has closed the connection

class Connection {
public:
  explicit Connection(int fd) : fd_(fd), block_(65536) {}
  ~Connection() {
    close(fd_);
    --open_connections;
  }

  void serve() {
    while (read_head()) {
      if (!settings.only_host.empty() && header("Host") != settings.only_host) {
        return;
      }
      if (settings.never_answer) {
        while (fill()) {
          input_.clear();
        }
        return;
      }
      respond();
      if (!keep_) {
        shutdown(fd_, SHUT_WR);
        return;
      }
      skip_body();
    }
  }

private:
  // ---- bytes

  bool fill() {
    for (;;) {
      const auto n = recv(fd_, block_.data(), block_.size(), 0);
      if (n > 0) {
        input_.append(block_.data(), static_cast<std::size_t>(n));
        return true;
      }
      if (n == 0) { return false; }
      if (errno != EINTR) { throw Disconnected(); }
    }
  }

  void send(std::string_view data) {
    while (!data.empty()) {
      const auto n = ::send(fd_, data.data(), data.size(), MSG_NOSIGNAL);
      if (n > 0) {
        data.remove_prefix(static_cast<std::size_t>(n));
      } else if (errno != EINTR) {
        throw Disconnected();
      }
    }
  }

  bool peer_closed() const {
    pollfd p = {fd_, POLLRDHUP, 0};
    return poll(&p, 1, 0) > 0;
  }

  // ---- the request

  bool read_head() {
    std::size_t end;
    while ((end = input_.find("\r\n\r\n")) == std::string::npos) {
      if (!fill()) { return false; }
    }
    head_ = input_.substr(0, end + 4);
    input_.erase(0, end + 4);
    const auto first = head_.find(' ');
    const auto second = head_.find(' ', first + 1);
    method_ = head_.substr(0, first);
    const auto target = head_.substr(first + 1, second - first - 1);
    const auto mark = target.find('?');
    path_ = target.substr(0, mark);
    query_ = mark == std::string::npos ? "" : target.substr(mark + 1);
    const auto connection = header("Connection");
    const bool old = head_.compare(second + 1, 8, "HTTP/1.0") == 0;
    keep_ = settings.one_at_a_time ? false
            : old                  ? connection == "keep-alive"
                                   : connection != "close";
    left_ = std::strtoull(header("Content-Length").c_str(), nullptr, 10);
    chunked_ = !header("Transfer-Encoding").empty();
    body_done_ = !chunked_ && left_ == 0;
    body_requested_ = header("Expect").empty();
    return true;
  }

  std::string header(const char *name) const {
    const auto length = std::strlen(name);
    for (auto at = head_.find("\r\n"); at != std::string::npos;
         at = head_.find("\r\n", at + 2)) {
      if (strncasecmp(head_.c_str() + at + 2, name, length) == 0 &&
          head_[at + 2 + length] == ':') {
        auto begin = at + 2 + length + 1;
        while (head_[begin] == ' ') {
          ++begin;
        }
        return head_.substr(begin, head_.find("\r\n", begin) - begin);
      }
    }
    return {};
  }

  std::string parameter(const std::string &name) const {
    std::size_t at = 0;
    while (at <= query_.size()) {
      const auto end = std::min(query_.find('&', at), query_.size());
      const auto pair = query_.substr(at, end - at);
      if (pair.compare(0, name.size() + 1, name + "=") == 0) {
        return pair.substr(name.size() + 1);
      }
      at = end + 1;
    }
    return {};
  }
  std::uint64_t number(const std::string &name) const {
    return std::strtoull(parameter(name).c_str(), nullptr, 10);
  }

  std::string line() {
    std::size_t end;
    while ((end = input_.find("\r\n")) == std::string::npos) {
      if (!fill()) { throw Disconnected(); }
    }
    auto text = input_.substr(0, end);
    input_.erase(0, end + 2);
    return text;
  }

  // The next piece of the body, "" at its end.
  std::string body_piece() {
    if (body_done_) { return {}; }
    if (!body_requested_) {
      send("HTTP/1.1 100 Continue\r\n\r\n");
      body_requested_ = true;
    }
    if (chunked_ && left_ == 0) {
      left_ = std::strtoull(line().c_str(), nullptr, 16);
      if (left_ == 0) {
        while (!line().empty()) {}
        body_done_ = true;
        return {};
      }
    }
    if (input_.empty() && !fill()) { throw Disconnected(); }
    auto piece =
        input_.substr(0, static_cast<std::size_t>(
                             std::min<std::uint64_t>(left_, input_.size())));
    input_.erase(0, piece.size());
    left_ -= piece.size();
    if (left_ == 0) {
      if (chunked_) {
        line();
      } else {
        body_done_ = true;
      }
    }
    return piece;
  }

  void skip_body() {
    while (!body_piece().empty()) {}
  }

  std::string body() {
    std::string all;
    for (auto piece = body_piece(); !piece.empty(); piece = body_piece()) {
      all += piece;
    }
    return all;
  }

  // ---- the response

  std::string head_text(const std::string &status, const std::string &lines) {
    return "HTTP/1.1 " + status + "\r\nServer: fake\r\n" + lines +
           (keep_ ? "" : "Connection: close\r\n") + "\r\n";
  }

  void head(const std::string &status, const std::string &lines) {
    send(head_text(status, lines));
  }

  // Head and body in one write, so that a kill leaves no partial response.
  void text(const std::string &body, const std::string &status = "200 OK",
            const std::string &type = "text/plain") {
    send(head_text(status, "Content-Type: " + type + "\r\nContent-Length: " +
                               std::to_string(body.size()) + "\r\n") +
         (method_ == "HEAD" ? "" : body));
  }

  void generated(std::uint64_t n, bool in_chunks) {
    std::string block;
    for (std::uint64_t at = 0; at < n;) {
      block.resize(
          static_cast<std::size_t>(std::min<std::uint64_t>(65536, n - at)));
      bytes::fill(&block[0], block.size(), at);
      at += block.size();
      if (in_chunks) {
        chunk(block);
      } else {
        send(block);
      }
    }
  }

  void chunk(const std::string &data) {
    char size[32];
    std::snprintf(size, sizeof(size), "%zx\r\n", data.size());
    send(size + data + "\r\n");
  }

  void respond() {
    if (Clock::now() - listening_since < Milliseconds(settings.ready_after)) {
      return text("not yet\n", "503 Service Unavailable");
    }
    if (path_ == "/echo") { return text(head_ + body()); }
    if (path_ == "/upload") { return upload(); }
    if (path_ == "/early413") { return refuse_early(); }
    if (method_ == "POST") { note_post(); }

    if (path_ == "/" && settings.root_delay) { wait_ms(settings.root_delay); }
    if (path_ == "/" && settings.root_status != 200) {
      text("no page\n", std::to_string(settings.root_status) + " Root");
    } else if (path_ == "/stop-listening") {
      ::shutdown(listener, SHUT_RDWR);
      text("listening no more\n");
    } else if (path_ == "/") {
      text("<!doctype html><title>fake</title><p>It works.\n", "200 OK",
           "text/html");
    } else if (path_ == "/pid") {
      text(std::to_string(getpid()) + "\n");
    } else if (path_ == "/cwd") {
      char name[4096];
      text(std::string(getcwd(name, sizeof(name)) ? name : "?") + "\n");
    } else if (path_ == "/args") {
      std::string lines;
      for (const auto &a : settings.args) {
        lines += a + "\n";
      }
      text(lines);
    } else if (path_ == "/env") {
      std::string lines;
      for (auto **e = environ; *e; ++e) {
        lines += std::string(*e) + "\n";
      }
      text(lines);
    } else if (path_ == "/connections") {
      text(std::to_string(connections) + "\n");
    } else if (path_ == "/fds") {
      text(inherited_fds);
    } else if (path_ == "/signals") {
      text(inherited_signals);
    } else if (path_ == "/write") {
      write_here();
    } else if (path_ == "/bytes") {
      head("200 OK", "Content-Type: application/octet-stream\r\n"
                     "Content-Length: " +
                         std::to_string(number("n")) + "\r\n");
      if (method_ != "HEAD") { generated(number("n"), false); }
    } else if (path_ == "/chunked") {
      head("200 OK", "Content-Type: application/octet-stream\r\n"
                     "Transfer-Encoding: chunked\r\n");
      if (method_ != "HEAD") {
        generated(number("n"), true);
        send("0\r\n\r\n");
      }
    } else if (path_ == "/close") {
      keep_ = false;
      head("200 OK", "Content-Type: application/octet-stream\r\n");
      if (method_ != "HEAD") { generated(number("n"), false); }
    } else if (path_ == "/sse") {
      events();
    } else if (path_ == "/slow") {
      wait_ms(static_cast<long>(number("ms")));
      text("slow\n");
    } else if (path_ == "/crash") {
      _exit(7);
    } else if (path_ == "/crash-mid") {
      head("200 OK", "Content-Length: 100000\r\n");
      generated(50000, false);
      _exit(7);
    } else if (path_ == "/ws" && !header("Upgrade").empty()) {
      tunnel();
    } else {
      text("no such thing\n", "404 Not Found");
    }
  }

  void note_post() {
    if (settings.posts_file.empty()) { return; }
    const auto all = body();
    append_line(settings.posts_file,
                all.size() <= 200 && all.find('\n') == std::string::npos
                    ? all
                    : std::to_string(all.size()));
  }

  void upload() {
    std::uint64_t count = 0;
    bool right = true;
    for (auto piece = body_piece(); !piece.empty(); piece = body_piece()) {
      right = right && bytes::match(piece.data(), piece.size(), count);
      count += piece.size();
    }
    text(std::to_string(count) + "\n", right ? "200 OK" : "400 Wrong Bytes");
  }

  // Closing with unread bytes sends a reset, which could overtake the response:
  // wait until the peer has closed.
  void refuse_early() {
    keep_ = false;
    text("too large\n", "413 Content Too Large");
    shutdown(fd_, SHUT_WR);
    pollfd p = {fd_, POLLRDHUP, 0};
    poll(&p, 1, 1000);
  }

  void write_here() {
    const int fd =
        open(query_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (fd < 0 || write(fd, "written\n", 8) != 8) {
      text(std::string(std::strerror(errno)) + "\n",
           "500 Internal Server Error");
    } else {
      text("written\n");
    }
    if (fd >= 0) { close(fd); }
  }

  void events() {
    head("200 OK", "Content-Type: text/event-stream\r\n"
                   "Cache-Control: no-cache\r\n"
                   "Transfer-Encoding: chunked\r\n");
    const auto gate = parameter("gate");
    for (std::uint64_t i = 1; i <= number("n"); ++i) {
      chunk("data: " + std::to_string(i) + "\n\n");
      struct stat s;
      while (i == 1 && !gate.empty() && stat(gate.c_str(), &s) != 0) {
        if (peer_closed()) { throw Disconnected(); }
        if (ending) { break; }
        wait_ms(5);
      }
      if (ending) { break; }
    }
    send("0\r\n\r\n");
  }

  void tunnel() {
    send("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\n"
         "Upgrade: " +
         header("Upgrade") + "\r\n\r\n");
    pollfd p = {fd_, POLLIN, 0};
    do {
      send(input_);
      input_.clear();
      while (!ending && poll(&p, 1, 5) == 0) {}
    } while (!ending && fill());
    if (ending) { send("bye"); }
    keep_ = false;
  }

  int fd_;
  std::vector<char> block_;
  std::string input_, head_, method_, path_, query_;
  std::uint64_t left_ = 0; // of the body, or of its current chunk
  bool chunked_ = false, body_done_ = true, keep_ = true,
       body_requested_ = true;
};

// ---- starting --------------------------------------------------------------

int listen_socket(int number) {
  sockaddr_storage address{};
  socklen_t size;
  const auto port = htons(static_cast<std::uint16_t>(number));
  if (settings.host.find(':') != std::string::npos) {
    auto &a = reinterpret_cast<sockaddr_in6 &>(address);
    a.sin6_family = AF_INET6;
    a.sin6_port = port;
    inet_pton(AF_INET6, settings.host.c_str(), &a.sin6_addr);
    size = sizeof(a);
  } else {
    auto &a = reinterpret_cast<sockaddr_in &>(address);
    a.sin_family = AF_INET;
    a.sin_port = port;
    inet_pton(AF_INET, settings.host.c_str(), &a.sin_addr);
    size = sizeof(a);
  }
  const int fd = socket(address.ss_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
  const int on = 1;
  setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
  if (fd < 0 || bind(fd, reinterpret_cast<sockaddr *>(&address), size) != 0 ||
      listen(fd, settings.backlog) != 0) {
    die("listen on port " + std::to_string(number));
  }
  return fd;
}

void also_listen() {
  wait_ms(settings.also_from);
  const int fd = listen_socket(0);
  wait_ms(settings.also_until - settings.also_from);
  close(fd);
}

void exit_after(long ms, int code) {
  std::thread([=] {
    wait_ms(ms);
    _exit(code);
  }).detach();
}

// Calls `first` in a thread at the first SIGTERM.
void on_term(void (*first)(long), long ms) {
  if (pipe2(term_pipe, O_CLOEXEC) != 0) { die("pipe"); }
  std::thread([=] {
    for (int count = 0;;) {
      char byte;
      if (read(term_pipe[0], &byte, 1) < 0) { continue; }
      if (!settings.term_file.empty()) {
        append_line(settings.term_file, "SIGTERM");
      }
      if (++count == 1) {
        std::thread(first, ms).detach();
      } else if (settings.polite) {
        _exit(1);
      }
    }
  }).detach();
  signal(SIGTERM, [](int) {
    if (write(term_pipe[1], "", 1) < 0) { _exit(1); }
  });
}

void exit_late(long ms) {
  wait_ms(ms);
  _exit(0);
}

void exit_politely(long) {
  ending = true;
  shutdown(listener, SHUT_RDWR);
  while (open_connections > 0) {
    wait_ms(5);
  }
  if (!settings.term_file.empty()) { append_line(settings.term_file, "exit"); }
  _exit(0);
}

// As cross-env, dotenv-cli and tsx do.
void launch() {
  launched = fork();
  if (launched < 0) { die("fork"); }
  if (launched == 0) { return; }
  signal(SIGTERM, [](int) { kill(launched, SIGTERM); });
  int status = 0;
  while (waitpid(launched, &status, 0) < 0 && errno == EINTR) {}
  std::exit(WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
}

void log_megabytes(long n) {
  std::string megabyte;
  while (megabyte.size() < 1u << 20) {
    megabyte += "fake: a log line, repeated over and over again ...........\n";
  }
  for (long i = 0; i < n; ++i) {
    if (std::fwrite(megabyte.data(), 1, megabyte.size(), stderr) !=
        megabyte.size()) {
      die("stderr");
    }
  }
}

void fork_worker() {
  const auto pid = fork();
  if (pid < 0) { die("fork"); }
  if (pid > 0) { return; }
  signal(SIGTERM, SIG_IGN);
  for (;;) {
    pause();
  }
}

} // namespace

int main(int argc, char **argv) {
  inherited_fds = list_fds();
  inherited_signals = list_signals();
  if (const auto *port = std::getenv("PORT")) {
    settings.port = std::atoi(port);
  }
  settings.args.assign(argv + 1, argv + argc);

  long exit_ms = -1, term_delay = -1;
  int exit_code = 0;
  bool ignore_term = false, launcher = false;
  const auto &args = settings.args;
  for (std::size_t i = 0; i < args.size(); ++i) {
    const auto &option = args[i];
    const auto value = [&]() -> const std::string & {
      if (++i >= args.size()) {
        errno = EINVAL;
        die(option);
      }
      return args[i];
    };
    const auto number = [&] { return std::atoi(value().c_str()); };
    if (option == "--host") {
      settings.host = value();
    } else if (option == "--port") {
      settings.port = number();
    } else if (option == "--listen-after") {
      settings.listen_after = number();
    } else if (option == "--ready-after") {
      settings.ready_after = number();
    } else if (option == "--exit-now") {
      exit_ms = 0;
      exit_code = number();
    } else if (option == "--exit-after") {
      exit_ms = number();
      exit_code = number();
    } else if (option == "--never-listen") {
      settings.never_listen = true;
    } else if (option == "--never-answer") {
      settings.never_answer = true;
    } else if (option == "--never-accept") {
      settings.never_accept = true;
    } else if (option == "--one-at-a-time") {
      settings.one_at_a_time = true;
    } else if (option == "--root-status") {
      settings.root_status = number();
    } else if (option == "--root-delay") {
      settings.root_delay = number();
    } else if (option == "--only-host") {
      settings.only_host = value();
    } else if (option == "--also-listen") {
      settings.also_from = number();
      settings.also_until = number();
    } else if (option == "--log-mb") {
      settings.log_mb = number();
    } else if (option == "--daemonize") {
      settings.daemonize = true;
    } else if (option == "--fork-worker") {
      settings.fork_worker = true;
    } else if (option == "--ignore-term") {
      ignore_term = true;
    } else if (option == "--term-delay") {
      term_delay = number();
    } else if (option == "--polite") {
      settings.polite = true;
    } else if (option == "--launcher") {
      launcher = true;
    } else if (option == "--term-file") {
      settings.term_file = value();
    } else if (option == "--backlog") {
      settings.backlog = number();
    } else if (option == "--count-file") {
      settings.count_file = value();
    } else if (option == "--posts-file") {
      settings.posts_file = value();
    } else if (option == "--args-follow") {
      break;
    } else {
      std::fputs(help, option == "--help" ? stdout : stderr);
      return option == "--help" ? 0 : 2;
    }
  }

  if (!settings.count_file.empty()) {
    append_line(settings.count_file, std::to_string(getpid()));
  }
  if (exit_ms == 0) { return exit_code; }
  if (launcher) { launch(); }
  if (settings.fork_worker) { fork_worker(); }
  if (settings.daemonize) {
    const auto pid = fork();
    if (pid < 0) { die("fork"); }
    if (pid > 0) { return 0; }
  }
  // Threads from here on: they would not survive a fork.
  if (exit_ms > 0) { exit_after(exit_ms, exit_code); }
  if (ignore_term) { signal(SIGTERM, SIG_IGN); }
  if (term_delay >= 0) { on_term(exit_late, term_delay); }
  if (settings.polite) { on_term(exit_politely, 0); }
  log_megabytes(settings.log_mb);
  wait_ms(settings.listen_after);
  while (settings.never_listen) {
    pause();
  }

  listener = listen_socket(settings.port);
  listening_since = Clock::now();
  if (settings.also_from >= 0) { std::thread(also_listen).detach(); }
  while (settings.never_accept) {
    pause();
  }
  for (;;) {
    const int fd = accept4(listener, nullptr, nullptr, SOCK_CLOEXEC);
    if (fd < 0) {
      if (errno == EINVAL) { pause(); } // it listens no more
      if (errno == EMFILE) { wait_ms(1); }
      continue;
    }
    ++connections;
    ++open_connections;
    const int on = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
    const auto serve = [fd] {
      try {
        Connection(fd).serve();
      } catch (const Disconnected &) {}
    };
    if (settings.one_at_a_time) {
      serve();
    } else {
      std::thread(serve).detach();
    }
  }
}
