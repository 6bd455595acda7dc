// Whole exchanges, over real sockets: a client, a proxy and a target that it is
// attached to, where the input has the bytes that one of the two sends. The
// other one is held to the letter, and both ends are compared with what the
// reference makes of those bytes.
//
// The input is a text of parts, each ended by RS (0x1E); within a part, US
// (0x1F) is a pause. The first character says what it is.
//
//   c<settings> <RS> the client's bytes: the target answers each request that
//     it gets. Whatever it gets must be the client's requests, as the reference
//     reads them, and the client must get an answer to each.
//   t<requests> <RS> an answer <RS> an answer ...: the client sends well-formed
//     requests, one a character. For each the target sends the next answer, of
//     which the first character says how it goes on: k(eep), c(lose), r(eset).
//     The client must see that answer, or an error of ours, or a connection
//     that ends too soon; and never a byte more.

#include "../../warmproxy.hpp"

#include "reference.hpp"

#include <arpa/inet.h>

#include <algorithm>
#include <deque>
#include <list>
#include <map>

namespace {

using reference::Bytes;
using Clock = std::chrono::steady_clock;

constexpr char part_end = '\x1e';
constexpr char pause_mark = '\x1f';

// Nothing that happens here takes nearly as long, on whatever machine.
constexpr std::chrono::seconds patience{8};

std::vector<std::string> split(const std::string &text, char at) {
  std::vector<std::string> parts(1);
  for (const char c : text) {
    if (c == at) {
      parts.emplace_back();
    } else {
      parts.back() += c;
    }
  }
  return parts;
}

std::string joined(const std::vector<std::string> &parts) {
  std::string all;
  for (const auto &part : parts) {
    all += part;
  }
  return all;
}

// ---- sockets ----------------------------------------------------------------

sockaddr_in loopback(int port) {
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  address.sin_port = htons(static_cast<std::uint16_t>(port));
  return address;
}

// One end of a connection. What it has to send goes out as the other end takes
// it, a pause being as long as nothing else happens.
struct End {
  explicit End(int fd) : fd_(fd) {
    const int on = 1;
    ::setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
  }
  End(const End &) = delete;
  End &operator=(const End &) = delete;
  ~End() { close(false); }

  bool open() const { return fd_ >= 0; }
  int fd() const { return fd_; }

  void cork() {
    const int on = 1;
    ::setsockopt(fd_, IPPROTO_TCP, TCP_CORK, &on, sizeof(on));
  }
  void send(const std::vector<std::string> &pieces) {
    to_send.insert(to_send.end(), pieces.begin(), pieces.end());
  }
  bool sent_all() const { return to_send.empty(); }

  // A reset leaves nothing behind in TIME_WAIT.
  void close(bool with_fin) {
    if (!open()) { return; }
    const linger how{1, 0};
    if (!with_fin) {
      ::setsockopt(fd_, SOL_SOCKET, SO_LINGER, &how, sizeof(how));
    }
    ::close(std::exchange(fd_, -1));
    to_send.clear();
  }

  // True if anything happened. `quiet`: nothing else did, so a pause is over.
  bool step(bool quiet) {
    bool moved = false;
    if (paused && quiet) { moved = !std::exchange(paused, false); }
    while (open() && !paused && !to_send.empty()) {
      auto &piece = to_send.front();
      const auto n = piece.empty() ? 0
                                   : ::send(fd_, piece.data(), piece.size(),
                                            MSG_DONTWAIT | MSG_NOSIGNAL);
      if (n < 0) {
        if (errno == EAGAIN) { break; }
        to_send.clear(); // nobody takes it any more
        break;
      }
      moved = true;
      piece.erase(0, static_cast<std::size_t>(n));
      if (!piece.empty()) { break; }
      to_send.pop_front();
      paused = !to_send.empty();
    }
    while (open() && !ended) {
      char block[65536];
      const auto n = ::recv(fd_, block, sizeof(block), MSG_DONTWAIT);
      if (n < 0 && errno == EAGAIN) { break; }
      moved = true;
      if (n > 0) {
        received.append(block, static_cast<std::size_t>(n));
      } else {
        ended = true;
        was_reset = n < 0;
      }
    }
    return moved;
  }

  std::string received;
  bool ended = false, was_reset = false;
  std::deque<std::string> to_send;
  bool paused = false;

private:
  int fd_;
};

// ---- what the target does
// ----------------------------------------------------

// A request that the target was sent.
struct Arrived {
  std::string text; // the head's
  reference::Head head;
  std::string raw_body;
  bool complete = false;
  bool answered = false;
};

struct TargetEnd : End {
  using End::End;
  std::size_t read = 0;         // of `received`: whole requests
  Arrived *current = nullptr;   // the one that is coming in
  bool tunnel = false;          // it was upgraded
  std::size_t tunnel_start = 0; // in `received`
};

// The proxies are made once and live as long as the fuzzer, each with the
// listening socket of the target that it is attached to.
struct Stage {
  explicit Stage(bool dressed) {
    listener = ::socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    auto address = loopback(0);
    socklen_t size = sizeof(address);
    const auto generic = reinterpret_cast<sockaddr *>(&address);
    REQUIRE(::bind(listener, generic, size) == 0 &&
                ::listen(listener, 1024) == 0 &&
                ::getsockname(listener, generic, &size) == 0,
            "no socket");
    warmproxy::Options options;
    options.binary = "/bin/false";
    options.target_port = ntohs(address.sin_port);
    options.health_path = "";
    options.prewarm = true;
    options.log = [](std::string_view) {};
    if (dressed) {
      options.strip_prefix = "/app";
      options.cors_origins = {"https://a.example"};
      options.cdn_cache = std::chrono::seconds(60);
      options.status_path = "/status";
    }
    proxy = new warmproxy::Proxy(options);
    port = proxy->bind_to_any_port("127.0.0.1");
    REQUIRE(port > 0, "no port");
    std::thread([this] { proxy->listen_after_bind(); }).detach();
    const auto until = Clock::now() + patience;
    while (proxy->status().state != "up") {
      REQUIRE(Clock::now() < until, "the proxy does not find its target");
      ::poll(nullptr, 0, 1);
    }
  }

  int listener = -1;
  int port = 0;
  warmproxy::Proxy *proxy = nullptr;
};

// What moves on one thread: the client, the target, and whoever decides what
// they do.
class Play {
public:
  explicit Play(Stage &stage) : stage_(stage) {}
  virtual ~Play() = default;

protected:
  void connect() {
    const int fd = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    auto address = loopback(stage_.port);
    REQUIRE(::connect(fd, reinterpret_cast<sockaddr *>(&address),
                      sizeof(address)) == 0,
            "the proxy takes no connection");
    client = std::make_unique<End>(fd);
    // One that the proxy has not accepted when it is gone would be the next
    // input's.
    go_on([this] { return stage_.proxy->status().connections > 0; },
          "the proxy does not accept");
  }

  // Called whenever something has come in.
  virtual void act() = 0;

  // Goes on until `done()`.
  template <typename Done> void go_on(Done done, const char *what) {
    const auto until = Clock::now() + patience;
    bool quiet = false;
    while (!done()) {
      REQUIRE(Clock::now() < until, what);
      bool moved = accept();
      if (client) { moved |= client->step(quiet); }
      for (auto &end : targets) {
        moved |= end.step(quiet);
      }
      if (moved) { act(); }
      quiet = !moved && !wait();
    }
  }

  // The client leaves; then the proxy has to let go of it all. What it still
  // sends to the target is read.
  void leave(bool with_fin) {
    client->close(with_fin);
    go_on(
        [this] {
          const auto status = stage_.proxy->status();
          return status.connections == 0 && status.in_flight == 0;
        },
        "the proxy does not let go");
    while (accept()) {}
    for (auto &end : targets) {
      end.step(true);
    }
  }

  std::unique_ptr<End> client;
  std::list<TargetEnd> targets;

private:
  bool accept() {
    const int fd = ::accept4(stage_.listener, nullptr, nullptr, SOCK_CLOEXEC);
    if (fd >= 0) { targets.emplace_back(fd); }
    return fd >= 0;
  }

  // False if nothing happens for a moment.
  bool wait() {
    std::vector<pollfd> fds{{stage_.listener, POLLIN, 0}};
    const auto add = [&fds](const End &end) {
      if (!end.open()) { return; }
      const bool sends = !end.to_send.empty() && !end.paused;
      fds.push_back(
          {end.fd(),
           static_cast<short>((end.ended ? 0 : POLLIN) | (sends ? POLLOUT : 0)),
           0});
      if (!fds.back().events) { fds.back().fd = -1; }
    };
    if (client) { add(*client); }
    for (const auto &end : targets) {
      add(end);
    }
    const timespec moment{0, 300000};
    return ::ppoll(fds.data(), fds.size(), &moment, nullptr) > 0;
  }

  Stage &stage_;
};

// ---- what a client sees
// ------------------------------------------------------

struct Answer {
  std::vector<reference::Head> interim;
  reference::Head head;
  reference::Decoded body;
  bool has_head = false;
  bool complete = false; // as far as a client can tell

  bool ours() const {
    return has_head &&
           head.values("cache-control") ==
               std::vector<std::string>{"no-store"} &&
           head.values("x-answer").empty();
  }
};

// Takes one answer off `bytes`, as the strictest client would.
Answer take_answer(Bytes &bytes, const reference::Head &request,
                   const End &end) {
  Answer answer;
  for (;;) {
    const auto text = reference::head_of(bytes, false);
    if (text.empty()) { return answer; }
    const auto head = reference::response(text, request.method, false);
    REQUIRE(head, "the client gets a malformed head");
    REQUIRE(head->minor == 1, "the client gets an answer of HTTP/1.0");
    REQUIRE(head->values("transfer-encoding").size() +
                    head->values("content-length").size() <=
                1,
            "the client gets two framings");
    bytes.remove_prefix(text.size());
    if (head->status >= 200 || head->status == 101) {
      answer.has_head = true;
      answer.head = *head;
      break;
    }
    REQUIRE(request.minor == 1, "an interim answer to a client of HTTP/1.0");
    answer.interim.push_back(*head);
  }
  REQUIRE(request.minor == 1 || answer.head.values("transfer-encoding").empty(),
          "chunks for a client of HTTP/1.0");
  answer.body = reference::body(answer.head.body, bytes);
  REQUIRE(answer.body.state != reference::State::wrong,
          "the client gets malformed chunks");
  bytes.remove_prefix(answer.body.size);
  answer.complete = answer.body.state == reference::State::done ||
                    (answer.head.body.kind == reference::Body::until_close &&
                     end.ended && !end.was_reset);
  return answer;
}

// ---- what we make of a head
// --------------------------------------------------

bool ends_here(const reference::Head &head, const std::string &name) {
  for (const auto known :
       {"connection", "keep-alive", "proxy-connection", "upgrade", "te"}) {
    if (name == known) { return true; }
  }
  return reference::has(head.list("connection"), name);
}

// The framing's lines leave no room for doubt.
std::string restated(const reference::Line &line) {
  const auto number = reference::decimal(line.value);
  return line.raw.substr(0, line.name.size()) + ": " +
         (number ? std::to_string(*number) : reference::lower(line.value));
}

// What names the client, and what only the platform and we may say; also in the
// disguise of '_', which a CGI program takes for '-'.
bool dropped(std::string name) {
  std::replace(name.begin(), name.end(), '_', '-');
  const auto begins = [&](const char *with) { return name.find(with) == 0; };
  return begins("x-forwarded-") || begins("x-vercel-internal-") ||
         begins("x-vercel-sc-") || name == "forwarded" || name == "x-real-ip" ||
         name == "proxy" || name == "warmproxy-wait";
}

// The head as the target has to get it, by the design's header rules. An empty
// Host in the result stands for the target's own address.
std::vector<std::string> forwarded(const reference::Head &request,
                                   const std::string &prefix) {
  auto target = request.target;
  const auto rest = target.substr(std::min(prefix.size(), target.size()));
  const bool strip = !prefix.empty() && target.find(prefix) == 0 &&
                     (rest.empty() || rest[0] == '/' || rest[0] == '?');
  if (strip) { target = rest; }
  if (target.empty() && request.method == "OPTIONS" &&
      !request.authority.empty() && !strip) {
    target = "*";
  } else if (target != "*" && target.substr(0, 1) != "/") {
    target = "/" + target;
  }
  std::vector<std::string> lines{request.method + " " + target + " HTTP/1.1"};
  const bool absolute = !request.authority.empty();
  const auto hosts = request.values("host");
  const auto host = absolute        ? request.authority
                    : hosts.empty() ? ""
                                    : hosts[0];
  if (absolute || hosts.empty()) { lines.push_back("Host: " + host); }
  for (const auto &line : request.lines) {
    const auto &name = line.name;
    if (name == "content-length" || name == "transfer-encoding") {
      lines.push_back(restated(line));
    } else if ((name == "host" && !absolute) ||
               (name == "upgrade" && request.upgrade())) {
      lines.push_back(line.raw);
    } else if (name != "host" && !dropped(name) &&
               !(name == "expect" && request.minor == 0) &&
               !ends_here(request, name)) {
      lines.push_back(line.raw);
    }
  }
  lines.push_back("X-Forwarded-For: 127.0.0.1");
  lines.push_back("X-Forwarded-Proto: http");
  if (!host.empty()) { lines.push_back("X-Forwarded-Host: " + host); }
  if (strip) { lines.push_back("X-Forwarded-Prefix: " + prefix); }
  const bool trailers =
      request.minor == 1 && reference::has(request.list("te"), "trailers");
  if (trailers) { lines.push_back("TE: trailers"); }
  if (request.upgrade() || trailers) {
    lines.push_back(
        std::string("Connection: ") + (request.upgrade() ? "Upgrade" : "") +
        (request.upgrade() && trailers ? ", " : "") + (trailers ? "TE" : ""));
  }
  return lines;
}

// The same of an answer.
std::vector<std::string> passed_on(const reference::Head &answer,
                                   const reference::Head &request) {
  std::vector<std::string> lines{"HTTP/1.1 " + answer.reason};
  const bool bodiless = answer.status < 200 || answer.status == 204;
  const bool chunked = !answer.values("transfer-encoding").empty();
  bool has_length = false;
  for (const auto &line : answer.lines) {
    const auto &name = line.name;
    if (name == "transfer-encoding" || name == "content-length") {
      const bool coding = name == "transfer-encoding";
      if (!bodiless &&
          (coding ? request.minor == 1
                  : !chunked && !std::exchange(has_length, true))) {
        lines.push_back(restated(line));
      }
      continue;
    }
    const bool kept =
        name == "upgrade" && (answer.status == 101 || answer.status == 426);
    if (!kept && ends_here(answer, name)) { continue; }
    lines.push_back(line.raw);
  }
  return lines;
}

// Less what we add: it differs with the state of things.
std::vector<std::string> as_passed_on(const reference::Head &head) {
  std::vector<std::string> lines{"HTTP/1.1 " + head.reason};
  for (const auto &line : head.lines) {
    if (line.name != "connection" &&
        line.raw.find("Server-Timing: warmproxy;") != 0) {
      lines.push_back(line.raw);
    }
  }
  return lines;
}

// ---- any bytes from the client
// -----------------------------------------------

class AnyClient : public Play {
public:
  AnyClient(Stage &stage, bool dressed, const std::string &settings,
            std::string bytes)
      : Play(stage), dressed_(dressed),
        pieces_(split(std::move(bytes), pause_mark)),
        upgrades_(has(settings, 'u')), closes_(has(settings, 'l')),
        says_close_(has(settings, 's')), early_(has(settings, 'e')),
        with_fin_(has(settings, 'f')) {}

  void run() {
    foresee();
    connect();
    client->send(pieces_);
    go_on(
        [this] {
          return client->ended ||
                 (client->sent_all() && answers_ >= requests_.size() &&
                  !ends_badly_ && tunnel_complete());
        },
        "the client waits in vain");
    leave(with_fin_);
    act();
    judge();
  }

private:
  struct Expected {
    reference::Head head;
    std::string raw_body;
    bool keep_alive = false;
  };

  static bool has(const std::string &settings, char c) {
    return settings.find(c) != std::string::npos;
  }

  // What the reference makes of all that the client sends.
  void foresee() {
    const auto all = joined(pieces_);
    Bytes bytes = all;
    for (;;) {
      while (bytes.substr(0, 2) == "\r\n") {
        bytes.remove_prefix(2);
      }
      const auto text = reference::head_of(bytes, false);
      if (text.empty()) { break; }
      const auto head = reference::request(text);
      if (!head) {
        ends_badly_ = true;
        break;
      }
      bytes.remove_prefix(text.size());
      const auto body = reference::body(head->body, bytes);
      Expected request{*head, std::string(bytes.substr(0, body.size)),
                       head->keep_alive()};
      if (answered_here(*head)) {
        // At once, and then a body that follows cannot be told from the next
        // request.
        request.keep_alive &=
            body.state == reference::State::done && body.size == 0;
      } else if (body.state != reference::State::done) {
        ends_badly_ = body.state == reference::State::wrong;
        partial_ = request;
        break;
      } else if (upgrades_ && head->upgrade()) {
        tunnel_ = std::string(bytes.substr(body.size));
        requests_.push_back(request);
        break;
      }
      bytes.remove_prefix(body.size);
      requests_.push_back(request);
      if (!request.keep_alive) { break; }
    }
  }

  bool answered_here(const reference::Head &head) const {
    const auto path = head.target.substr(0, head.target.find('?'));
    return !head.values("warmproxy-wait").empty() ||
           (dressed_ &&
            (path == "/status" ||
             (head.method == "OPTIONS" && !head.values("origin").empty() &&
              !head.values("access-control-request-method").empty())));
  }

  bool tunnel_complete() const {
    if (!tunnel_) { return true; }
    for (const auto &end : targets) {
      if (end.tunnel) {
        return end.received.size() - end.tunnel_start >= tunnel_->size();
      }
    }
    return false;
  }

  void act() override {
    for (auto &end : targets) {
      while (read_request(end)) {}
      if (end.tunnel && end.ended) { end.close(true); }
    }
    Bytes bytes = client->received;
    answers_ = 0;
    while (answers_ < requests_.size()) {
      const auto answer = take_answer(bytes, requests_[answers_].head, *client);
      if (!answer.complete) { break; }
      ++answers_;
      if (answer.head.status == 101) { break; }
    }
  }

  // Takes what the target got for a request; true if it may have got another.
  bool read_request(TargetEnd &end) {
    if (end.tunnel || !end.open()) { return false; }
    const auto bytes = Bytes(end.received).substr(end.read);
    if (!end.current) {
      const auto text = reference::head_of(bytes, false);
      if (text.empty()) { return false; }
      const auto head = reference::request(text);
      REQUIRE(head, "the target gets a malformed head");
      arrived_.push_back({std::string(text), *head, {}, false, false});
      end.current = &arrived_.back();
    }
    auto &request = *end.current;
    const auto rest = bytes.substr(request.text.size());
    const auto body = reference::body(request.head.body, rest);
    REQUIRE(body.state != reference::State::wrong,
            "the target gets malformed chunks");
    request.raw_body = std::string(rest.substr(0, body.size));
    request.complete = body.state == reference::State::done;
    if (!request.answered && (request.complete || early_)) {
      answer(end, request);
    }
    if (!request.complete || !end.open()) { return false; }
    end.read += request.text.size() + body.size;
    end.current = nullptr;
    if (end.tunnel) { end.tunnel_start = end.read; }
    return true;
  }

  void answer(TargetEnd &end, Arrived &request) {
    request.answered = true;
    const auto number = "X-Answer: " + std::to_string(arrived_.size()) + "\r\n";
    if (upgrades_ && request.head.upgrade()) {
      end.tunnel = true;
      end.send({"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\n"
                "Upgrade: x\r\n" +
                number + "\r\n"});
      end.step(false);
      return;
    }
    const bool last = closes_ || says_close_;
    // So that a FIN goes along with the answer: one that comes later, a
    // pipelined POST can meet, and then it must fail.
    if (last) { end.cork(); }
    end.send({"HTTP/1.1 200 OK\r\n" + number +
              (says_close_ ? "Connection: close\r\n" : "") +
              "Content-Length: 6\r\n\r\n" +
              (request.head.method == "HEAD" ? "" : "answer")});
    end.step(false);
    if (last) { end.close(true); }
  }

  void judge() {
    const std::string prefix = dressed_ ? "/app" : "";
    const auto same = [&](const Arrived &request, const Expected &expected) {
      auto lines = reference::lines_of(request.text, false);
      for (auto &line : lines) {
        if (line.find("Host: 127.0.0.1:") == 0) { line = "Host: "; }
      }
      REQUIRE(lines == forwarded(expected.head, prefix),
              "the target gets another head");
      REQUIRE(expected.raw_body.compare(0, request.raw_body.size(),
                                        request.raw_body) == 0,
              "the target gets another body");
    };
    auto next = arrived_.begin();
    Bytes bytes = client->received;
    bool open = true;
    for (const auto &expected : requests_) {
      const auto answer = take_answer(bytes, expected.head, *client);
      REQUIRE(answer.complete, "a request without an answer");
      REQUIRE(answer.ours() == answered_here(expected.head),
              answer.ours() ? "refused, where the reference accepts"
                            : "handed over, where we should have answered");
      open = !reference::has(answer.head.list("connection"), "close");
      const bool early = early_ && !expected.raw_body.empty();
      REQUIRE(open == expected.keep_alive || answer.head.status == 101 ||
                  (early && !open),
              "closed, where it should stay, or the other way round");
      if (answer.ours()) { continue; }
      REQUIRE(next != arrived_.end() && next->answered,
              "an answer to a request that never arrived");
      REQUIRE(answer.head.values("x-answer") ==
                  std::vector<std::string>{std::to_string(
                      std::distance(arrived_.begin(), next) + 1)},
              "the answer to another request");
      same(*next, expected);
      REQUIRE(next->raw_body == expected.raw_body || (early && !open),
              "not the whole body");
      ++next;
      if (!open) { break; }
    }
    if (open && partial_ && next != arrived_.end()) {
      REQUIRE(!next->complete, "a request that was never sent");
      same(*next, *partial_);
      if (next->answered && !bytes.empty()) {
        const auto answer = take_answer(bytes, partial_->head, *client);
        REQUIRE(answer.complete, "a request without an answer");
        open = false;
      }
      ++next;
    }
    REQUIRE(next == arrived_.end(), "a request out of nowhere");

    if (tunnel_) {
      for (const auto &end : targets) {
        if (!end.tunnel) { continue; }
        REQUIRE(Bytes(end.received).substr(end.tunnel_start) == *tunnel_,
                "other bytes in the tunnel");
      }
    }
    if (!bytes.empty()) {
      const auto last = take_answer(bytes, {}, *client);
      REQUIRE(last.complete && last.ours() && last.head.status >= 400 &&
                  bytes.empty() && open,
              "bytes behind the last answer");
    } else {
      REQUIRE(!ends_badly_ || !open, "closed without a word");
    }
  }

  const bool dressed_;
  const std::vector<std::string> pieces_;
  const bool upgrades_, closes_, says_close_, early_, with_fin_;

  // As the reference has it: whole requests; one that is incomplete; whether
  // what follows is refused; what goes through the tunnel.
  std::vector<Expected> requests_;
  std::optional<Expected> partial_;
  bool ends_badly_ = false;
  std::optional<std::string> tunnel_;

  std::list<Arrived> arrived_;
  std::size_t answers_ = 0; // that the client has
};

// ---- any bytes from the target ----------------------------------------------

struct Known {
  const char *first, *lines, *body;
};

const std::map<char, Known> &known_requests() {
  static const std::map<char, Known> all = {
      {'g', {"GET /g HTTP/1.1", "", ""}},
      {'h', {"HEAD /h HTTP/1.1", "", ""}},
      {'d', {"DELETE /d HTTP/1.1", "", ""}},
      {'p', {"POST /p HTTP/1.1", "Content-Length: 5\r\n", "hello"}},
      {'q',
       {"PUT /q HTTP/1.1", "Transfer-Encoding: chunked\r\n",
        "5\r\nhello\r\n0\r\n\r\n"}},
      {'u', {"GET /u HTTP/1.1", "Connection: Upgrade\r\nUpgrade: x\r\n", ""}},
      {'0', {"GET /0 HTTP/1.0", "", ""}},
      {'1', {"GET /1 HTTP/1.0", "Connection: keep-alive\r\n", ""}},
      {'l', {"GET /l HTTP/1.1", "Connection: close\r\n", ""}}};
  return all;
}

class AnyTarget : public Play {
public:
  AnyTarget(Stage &stage, const std::string &requests,
            std::vector<std::string> answers)
      : Play(stage), answers_(std::move(answers)) {
    for (const char c : requests) {
      const auto known = known_requests().find(c);
      if (known != known_requests().end() && requests_.size() < 6) {
        requests_.push_back(known->second);
      }
    }
  }

  void run() {
    for (std::size_t i = 0; i < requests_.size(); ++i) {
      const auto &request = requests_[i];
      if (!client || client->ended) {
        if (client) { leave(true); }
        connect();
        begin_ = 0;
      }
      const auto text = std::string(request.first) +
                        "\r\nHost: a\r\nX-Number: " + std::to_string(i) +
                        "\r\n" + request.lines + "\r\n";
      head_ = *reference::request(text);
      current_ = i;
      whole_ = false;
      deliveries_.clear();
      client->send({text + request.body});
      // What the target still has to say of earlier ones must be there before.
      go_on([this] { return (whole_ && all_said()) || client->ended; },
            "the client waits in vain");
      judge();
      if (!whole_ || answer_.head.status == 101) {
        leave(true);
        client.reset();
      } else if (reference::has(answer_.head.list("connection"), "close") ||
                 (head_.minor == 0 &&
                  !reference::has(answer_.head.list("connection"),
                                  "keep-alive"))) {
        go_on([this] { return client->ended; }, "the connection stays open");
        REQUIRE(client->received.size() == begin_, "bytes behind the answer");
      }
    }
    if (client) {
      leave(true);
      REQUIRE(client->received.size() == begin_, "bytes behind the answer");
    }
  }

private:
  struct Delivery {
    std::string bytes; // of the answer, all of them
    char end = 'k';    // what came behind
  };

  bool all_said() const {
    return std::all_of(targets.begin(), targets.end(),
                       [](const TargetEnd &end) { return end.sent_all(); });
  }

  void act() override {
    for (auto &end : targets) {
      while (read_request(end)) {}
      // What the answer ends with comes behind its last byte.
      const auto closing = closing_.find(&end);
      if (closing != closing_.end() && end.sent_all()) {
        if (closing->second != 'k') { end.close(closing->second == 'c'); }
        closing_.erase(closing);
      }
    }
    Bytes bytes = Bytes(client->received).substr(begin_);
    answer_ = take_answer(bytes, head_, *client);
    whole_ = answer_.complete;
    if (whole_ && answer_.head.status == 101) {
      // A tunnel: it is over when the target says so.
      whole_ = client->ended;
    }
  }

  bool read_request(TargetEnd &end) {
    if (!end.open() || end.tunnel) { return false; }
    const auto bytes = Bytes(end.received).substr(end.read);
    const auto text = reference::head_of(bytes, false);
    if (text.empty()) { return false; }
    const auto head = reference::request(text);
    REQUIRE(head, "the target gets a malformed head");
    const auto body = reference::body(head->body, bytes.substr(text.size()));
    REQUIRE(body.state != reference::State::wrong,
            "the target gets malformed chunks");
    if (body.state != reference::State::done) { return false; }
    end.read += text.size() + body.size;
    REQUIRE(head->values("x-number") ==
                std::vector<std::string>{std::to_string(current_)},
            "the target gets another request");
    deliver(end);
    return true;
  }

  void deliver(TargetEnd &end) {
    Delivery delivery{"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n", 'k'};
    if (head_.method != "HEAD") { delivery.bytes += "ok"; }
    std::vector<std::string> pieces{delivery.bytes};
    if (next_ < answers_.size()) {
      auto part = answers_[next_++];
      const char how = part.empty() ? 'k' : part[0];
      part.erase(0, 1);
      pieces = split(part, pause_mark);
      delivery.bytes = joined(pieces);
      delivery.end = how == 'r' ? 'r' : how == 'c' ? 'c' : 'k';
      // One that has no end of its own needs one.
      if (delivery.end == 'k' && !read(delivery).delimited) {
        delivery.end = 'c';
      }
    }
    deliveries_.push_back(delivery);
    closing_[&end] = delivery.end;
    end.send(pieces);
    end.step(false);
  }

  // What the reference makes of an answer.
  struct Reading {
    std::vector<reference::Head> interim;
    std::optional<reference::Head> head;
    reference::Decoded body;
    bool nothing = false; // no byte that the client could have
    bool delimited =
        false; // complete, and the end of the connection not needed
    bool complete = false;
    std::string tunnel;
  };

  Reading read(const Delivery &delivery) const {
    Reading reading;
    Bytes bytes = delivery.bytes;
    for (;;) {
      const auto text = reference::head_of(bytes, true);
      if (text.empty()) {
        reading.nothing =
            bytes.empty() && (reading.interim.empty() || head_.minor == 0);
        return reading;
      }
      const auto head = reference::response(text, head_.method, true);
      if (!head || (head->status == 101 && !head_.upgrade())) {
        return reading;
      }
      bytes.remove_prefix(text.size());
      if (head->status == 101) {
        reading.head = head;
        reading.tunnel = std::string(bytes);
        reading.complete = delivery.end != 'r';
        return reading;
      }
      if (head->status >= 200) {
        reading.head = head;
        break;
      }
      reading.interim.push_back(*head);
    }
    reading.body = reference::body(reading.head->body, bytes);
    reading.delimited = reading.body.state == reference::State::done;
    reading.complete = reading.delimited || (reading.head->body.kind ==
                                                 reference::Body::until_close &&
                                             delivery.end != 'r');
    return reading;
  }

  void judge() {
    const auto all = Bytes(client->received).substr(begin_);
    begin_ = client->received.size() - rest(all).size();
    REQUIRE(!deliveries_.empty(), "an answer out of nowhere");
    const bool repeatable = head_.body.kind == reference::Body::none &&
                            (head_.method == "GET" || head_.method == "HEAD");
    for (std::size_t i = 0; i + 1 < deliveries_.size(); ++i) {
      REQUIRE(repeatable, "a request was sent twice");
      REQUIRE(read(deliveries_[i]).nothing, "an answer was thrown away");
    }
    const auto reading = read(deliveries_.back());

    // Interim answers are passed on, as far as we got.
    const auto expected_interim = head_.minor == 1 ? reading.interim.size() : 0;
    REQUIRE(answer_.interim.size() <= expected_interim,
            "more interim answers than there were");
    for (std::size_t i = 0; i < answer_.interim.size(); ++i) {
      REQUIRE(as_passed_on(answer_.interim[i]) ==
                  passed_on(reading.interim[i], head_),
              "another interim answer");
    }

    if (!reading.head) {
      REQUIRE(!answer_.has_head || answer_.ours(),
              "an answer that the reference refuses");
      REQUIRE(answer_.has_head && answer_.head.status == 502,
              "a bad answer and not a word of ours");
      return;
    }
    if (!answer_.has_head) {
      REQUIRE(!reading.complete, "the answer was not passed on");
      return;
    }
    if (!reading.complete && answer_.ours() && answer_.head.status == 502) {
      return; // noticed in time
    }
    REQUIRE(answer_.interim.size() == expected_interim,
            "an interim answer was lost");
    REQUIRE(as_passed_on(answer_.head) == passed_on(*reading.head, head_),
            "another answer");
    if (reading.head->status == 101) {
      const auto tunnelled = all.substr(all.size() - rest(all).size());
      REQUIRE(!reading.complete || tunnelled == reading.tunnel,
              "other bytes in the tunnel");
      REQUIRE(Bytes(reading.tunnel).substr(0, tunnelled.size()) == tunnelled,
              "other bytes in the tunnel");
      begin_ = client->received.size();
      return;
    }
    REQUIRE(answer_.complete == reading.complete,
            reading.complete ? "the answer was cut"
                             : "a cut answer looks complete");
    const auto &content = answer_.body.content;
    REQUIRE(reading.complete
                ? content == reading.body.content
                : reading.body.content.compare(0, content.size(), content) == 0,
            "another content");
  }

  // What is behind the answer.
  Bytes rest(Bytes bytes) const {
    take_answer(bytes, head_, *client);
    return bytes;
  }

  const std::vector<std::string> answers_;
  std::vector<Known> requests_;

  std::size_t next_ = 0;    // of answers_
  std::size_t current_ = 0; // of requests_
  std::size_t begin_ = 0;   // of the current answer, in what the client got
  reference::Head head_;    // of the current request
  std::vector<Delivery> deliveries_;
  std::map<TargetEnd *, char> closing_;
  Answer answer_;
  bool whole_ = false;
};

} // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t *data,
                                      std::size_t size) {
  static auto &plain = *new Stage(false);
  static auto &dressed = *new Stage(true);

  auto parts =
      split(std::string(reinterpret_cast<const char *>(data), size), part_end);
  if (parts.size() < 2 || std::count(data, data + size, pause_mark) > 8) {
    return 0;
  }
  const auto settings = parts[0];
  parts.erase(parts.begin());
  if (settings[0] == 'c') {
    const bool with_options = settings.find('d') != std::string::npos;
    AnyClient(with_options ? dressed : plain, with_options, settings, parts[0])
        .run();
  } else if (settings[0] == 't') {
    AnyTarget(plain, settings.substr(1), std::move(parts)).run();
  }
  return 0;
}
