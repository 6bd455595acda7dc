// Whole exchanges over real sockets: a client, a proxy, and a target that the
// proxy is attached to. The input has the bytes that one of client and target
// sends; the other one behaves well. What arrives at both ends is compared with
// what the reference makes of the input: no byte may be lost, doubled or
// attributed to another request, a truncated response must not look complete,
// nothing may be sent twice that must not be, and no connection to the target
// may serve whom it must not serve.
//
// The input consists of parts, each ended by RS (0x1E); US (0x1F) within a part
// is a pause, "{port}" stands for the target's port and "{big}" for 100,000
// bytes, more than fits into a head or a buffer. The first part begins with a
// letter:
//
//   c<settings> <RS> the client's bytes
//     The target answers each request that it gets. The requests that arrive
//     must be those that the reference reads in these bytes, and the client
//     must get a response to each of them. The settings are the letters
//       d  the proxy has a prefix, CORS, a cache time and a status path
//       p  the proxy trusts a proxy in front of it
//       u  the target grants upgrades
//       l  the target closes the connection after each response
//       s  the same, and announces it
//       e  the target responds as soon as it has the head
//       f  the client ends with a FIN instead of a reset
//   t<requests> <RS> a response <RS> a response ...
//     The client sends these well-formed requests, one for each letter (see
//     known_requests), and the target sends one response after the other. A
//     response begins with the letter k(eep), c(lose) or r(eset), which says
//     what follows it. The client must get that response, an error of the
//     proxy, or an aborted connection; and never a byte more. `n` among the
//     letters: the next request comes from a new client.
//   T<requests> ...
//     The same through the proxy that has a prefix and so on.
//   F<requests> ...
//     The same through the proxy that trusts a proxy in front of it.

// One loop, so that all connections share one pool. The connection that Stage
// leaves idle must not be closed.
#define WARMPROXY_MAX_LOOPS 1
#define WARMPROXY_UPSTREAM_IDLE_TIMEOUT 1000000000

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

// Nothing here takes nearly as long, however slow the machine is.
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

std::string replaced(std::string text, const std::string &from,
                     const std::string &to) {
  for (auto at = text.find(from); at != std::string::npos;
       at = text.find(from, at + to.size())) {
    text.replace(at, from.size(), to);
  }
  return text;
}

// All different, in groups of ten.
std::string big() {
  std::string all;
  for (int i = 0; i < 10000; ++i) {
    all += std::to_string(1000000000 + i);
  }
  return all;
}

bool begins(Bytes text, Bytes with) {
  return text.substr(0, with.size()) == with;
}

// ---- sockets ----------------------------------------------------------------

sockaddr_in loopback(int port) {
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  address.sin_port = htons(static_cast<std::uint16_t>(port));
  return address;
}

// The kernel makes the proxy's send buffer some twenty segments large. With
// small ones the proxy often has to wait until it can send more.
void limit_buffers(int fd) {
  const int receive = 16384, segment = 536;
  ::setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &receive, sizeof(receive));
  ::setsockopt(fd, IPPROTO_TCP, TCP_MAXSEG, &segment, sizeof(segment));
}

// One end of a connection. It sends as fast as the other end receives; a pause
// lasts until nothing else happens.
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

// ---- the target -------------------------------------------------------------

// Whether NTLM or Negotiate is mentioned, which log in a connection.
bool logs_in(const reference::Head &head) {
  for (const auto name : {"authorization", "www-authenticate"}) {
    for (const auto &element : head.list(name)) {
      const auto scheme = element.substr(0, element.find(' '));
      if (scheme == "ntlm" || scheme == "negotiate") { return true; }
    }
  }
  return false;
}

bool has_body(const reference::Head &request) {
  return request.body.kind == reference::Body::chunked ||
         (request.body.kind == reference::Body::length &&
          request.body.size > 0);
}

struct TargetEnd;

// A request that the target was sent.
struct Arrived {
  TargetEnd *end;
  std::string text; // the head's
  reference::Head head;
  std::string raw_body = {};
  bool complete = false;
  bool answered = false;
};

struct TargetEnd : End {
  TargetEnd(int fd, bool front) : End(fd), behind_front(front) {}

  // These two apply the design's "Connections to the target".
  void note_request(const reference::Head &request, int client) {
    REQUIRE(!owner || !behind_front,
            "a connection is used again behind a front");
    REQUIRE(!unusable, "a connection to the target must not be reused");
    REQUIRE(!owner || owner == client,
            "a connection is private to another client");
    ++requests;
    logged_in |= logs_in(request);
    if (has_body(request) || logged_in) { owner = client; }
  }
  // `lasts`: as far as the response itself goes.
  void note_response(const reference::Head &request,
                     const reference::Head &response, bool lasts, int client) {
    logged_in |= logs_in(response);
    if (logged_in) { owner = client; }
    unusable =
        !lasts || request.upgrade() || (request.method == "HEAD" && !logged_in);
  }

  const bool behind_front;      // where many clients share a connection
  std::size_t read = 0;         // of `received`: whole requests
  Arrived *current = nullptr;   // the one that is coming in
  bool tunnel = false;          // it was upgraded
  std::size_t tunnel_start = 0; // in `received`
  int requests = 0;
  int owner = 0; // the only client that may use it; 0: any
  bool logged_in = false;
  bool unusable = false; // for another request
};

// The proxies are made once and live as long as the fuzzer, each with the
// listening socket of the target that it is attached to.
struct Stage {
  enum class Kind { plain, dressed, trusting };

  explicit Stage(Kind kind) : trusts(kind == Kind::trusting) {
    listener = ::socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    limit_buffers(listener);
    auto address = loopback(0);
    socklen_t size = sizeof(address);
    const auto generic = reinterpret_cast<sockaddr *>(&address);
    REQUIRE(::bind(listener, generic, size) == 0 &&
                ::listen(listener, 1024) == 0 &&
                ::getsockname(listener, generic, &size) == 0,
            "no socket");
    target_port = std::to_string(ntohs(address.sin_port));
    warmproxy::Options options;
    options.binary = "/bin/false";
    options.target_port = ntohs(address.sin_port);
    options.health_path = "";
    options.prewarm = true;
    options.keep_alive_timeout = std::chrono::seconds(0);
    options.log = [](std::string_view) {};
    options.trust_proxy = trusts;
    if (kind == Kind::dressed) {
      prefix = "/app";
      options.strip_prefix = prefix;
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

  int connect() const {
    const auto until = Clock::now() + patience;
    for (;;) {
      const int fd = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
      limit_buffers(fd);
      auto address = loopback(port);
      if (::connect(fd, reinterpret_cast<sockaddr *>(&address),
                    sizeof(address)) == 0) {
        return fd;
      }
      // Interrupted by the fuzzer's timer, or no port is free at the moment.
      const int error = errno;
      ::close(fd);
      if ((error != EINTR && error != EADDRNOTAVAIL) || Clock::now() >= until) {
        std::fprintf(stderr, "connect: %s\n", std::strerror(error));
        REQUIRE(false, "the proxy takes no connection");
      }
      ::poll(nullptr, 0, 10);
    }
  }

  // Only a target that leaves an idle connection open for a second gets a
  // request that must not be repeated on a reused connection. So one stays
  // idle all the time, which is private to a client of its own.
  void leave_one_idle() {
    char byte = 0;
    if (idle_target &&
        ::recv(idle_target->fd(), &byte, 1, MSG_PEEK | MSG_DONTWAIT) < 0) {
      return;
    }
    idle_client.reset();
    idle_target.reset();
    const auto until = Clock::now() + patience;
    const auto go_on = [&until](bool moved) {
      REQUIRE(Clock::now() < until, "no connection stays idle");
      if (!moved) { ::poll(nullptr, 0, 1); }
      return true;
    };
    while (proxy->status().connections > 0) {
      go_on(false);
    }
    idle_client = std::make_unique<End>(connect());
    idle_client->send({"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1"
                       "\r\n\r\n!"});
    while (!idle_target || idle_target->received.empty() ||
           idle_target->received.back() != '!') {
      go_on(idle_client->step(true) ||
            (idle_target && idle_target->step(true)));
      if (idle_target && !idle_target->ended) { continue; }
      const int fd = ::accept4(listener, nullptr, nullptr, SOCK_CLOEXEC);
      if (fd >= 0) { idle_target = std::make_unique<End>(fd); }
    }
    idle_target->send({"HTTP/1.1 204 No Content\r\n\r\n"});
    while (idle_client->received.empty()) {
      go_on(idle_client->step(true) || idle_target->step(true));
    }
    ::poll(nullptr, 0, 1100);
  }

  // Besides the one that has the idle connection.
  std::size_t connections() const { return proxy->status().connections - 1; }

  int listener = -1;
  int port = 0;
  std::string target_port;
  std::string prefix;
  const bool trusts;
  warmproxy::Proxy *proxy = nullptr;
  std::unique_ptr<End> idle_client, idle_target;
};

// Runs client and target, on one thread.
class Play {
public:
  explicit Play(Stage &s) : stage(s) {}
  virtual ~Play() = default;

protected:
  void connect() {
    client = std::make_unique<End>(stage.connect());
    // If it ended before the proxy accepts it, the proxy might accept it during
    // the next input.
    go_on([this] { return stage.connections() > 0; },
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

  // The client leaves, and then the proxy has to close the connection. What it
  // still sends to the target is read.
  void leave(bool with_fin) {
    client->close(with_fin);
    go_on(
        [this] {
          return stage.connections() == 0 &&
                 stage.proxy->status().in_flight == 0;
        },
        "the proxy does not close its connections");
    while (accept()) {}
    int private_ones = 0;
    for (auto &end : targets) {
      end.step(true);
      private_ones += end.open() && !end.ended && end.owner;
    }
    // The proxy may set one aside, out of use, to see how long the target
    // leaves it open, and another one after an idle connection has ended.
    REQUIRE(private_ones <= 2, "private connections outlive their clients");
  }

  Stage &stage;
  std::unique_ptr<End> client;
  std::list<TargetEnd> targets;

private:
  bool accept() {
    const int fd = ::accept4(stage.listener, nullptr, nullptr, SOCK_CLOEXEC);
    if (fd >= 0) { targets.emplace_back(fd, stage.trusts); }
    return fd >= 0;
  }

  // False if nothing happens for a moment.
  bool wait() {
    std::vector<pollfd> fds{{stage.listener, POLLIN, 0}};
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
};

// ---- what the client gets ---------------------------------------------------

struct Answer {
  std::vector<reference::Head> interim;
  reference::Head head;
  reference::Decoded body;
  bool has_head = false;
  bool complete = false; // as far as a client can tell

  // Whether the proxy made it.
  bool ours() const {
    return has_head && head.has_field("date") && !head.has_field("x-answer") &&
           head.values("cache-control") == std::vector<std::string>{"no-store"};
  }
  bool closes() const {
    return reference::has(head.list("connection"), "close");
  }
};

bool bare_lf(Bytes text) {
  for (std::size_t i = 0; i < text.size(); ++i) {
    if (text[i] == '\n' && (i == 0 || text[i - 1] != '\r')) { return true; }
  }
  return false;
}

// Takes one answer off `bytes`, as the strictest client would.
Answer take_answer(Bytes &bytes, const reference::Head &request,
                   const End &end) {
  Answer answer;
  for (;;) {
    const auto text = reference::head_of(bytes, false);
    if (text.empty()) { return answer; }
    const auto head = reference::response(text, request.method, false);
    REQUIRE(head && !bare_lf(text), "the client gets a malformed head");
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
  // Control characters in a trailer's value pass, superfluous blanks do not.
  answer.body = reference::body(answer.head.body, bytes, true);
  REQUIRE(answer.body.state != reference::State::wrong &&
              (answer.body.sent_on.empty() ||
               answer.body.state != reference::State::done ||
               answer.body.sent_on == bytes.substr(0, answer.body.size)),
          "the client gets malformed chunks");
  bytes.remove_prefix(answer.body.size);
  answer.complete = answer.body.state == reference::State::done ||
                    (answer.head.body.kind == reference::Body::until_close &&
                     end.ended && !end.was_reset);
  return answer;
}

// ---- what becomes of a head -------------------------------------------------

bool hop_by_hop(const reference::Head &head, const std::string &name) {
  for (const auto known : {"connection", "keep-alive", "proxy-connection", "te",
                           "upgrade", "http2-settings"}) {
    if (name == known) { return true; }
  }
  return reference::has(head.list("connection"), name);
}

bool framing(const std::string &name) {
  return name == "content-length" || name == "transfer-encoding";
}

// What names the client.
bool forwarding(const std::string &name) {
  return begins(name, "x-forwarded-") || name == "forwarded" ||
         name == "x-forwarded" || name == "x-real-ip";
}

// What never reaches the target: what only the platform may say, and both kinds
// in the disguise of '_', which CGI programs take for '-'.
bool reserved(const std::string &name) {
  auto plain = name;
  std::replace(plain.begin(), plain.end(), '_', '-');
  return name == "proxy" || name == "warmproxy-wait" ||
         begins(plain, "x-vercel-internal-") || begins(plain, "x-vercel-sc-") ||
         (plain != name && forwarding(plain));
}

// The lines that must pass as they are, in their order.
template <typename Passes>
std::vector<std::string> lines_that(const reference::Head &head,
                                    Passes passes) {
  std::vector<std::string> lines;
  for (const auto &line : head.lines) {
    if (passes(line.name)) { lines.push_back(line.raw); }
  }
  return lines;
}

std::vector<std::uint64_t> lengths(const reference::Head &head) {
  std::vector<std::uint64_t> all;
  for (const auto &value : head.values("content-length")) {
    all.push_back(*reference::decimal(value));
  }
  return all;
}

bool below(const std::string &target, const std::string &prefix) {
  const auto end = target.substr(std::min(prefix.size(), target.size()), 1);
  return begins(target, prefix) && (end.empty() || end == "/" || end == "?");
}

bool strips(const reference::Head &request, const Stage &stage) {
  return !stage.prefix.empty() && below(request.target, stage.prefix);
}

using Values = std::vector<std::string>;

void check_host(const reference::Head &sent, const reference::Head &got,
                const Stage &stage) {
  const auto hosts = sent.values("host");
  const bool none = hosts.empty() && sent.authority.empty();
  const auto host = !sent.authority.empty() ? sent.authority
                    : none                  ? "127.0.0.1:" + stage.target_port
                                            : hosts[0];
  REQUIRE(got.values("host") == Values{host}, "another Host");

  const auto &prefix = stage.prefix;
  const bool strip = strips(sent, stage);
  auto own_host = none || host.empty() ? Values() : Values{host};
  auto own_prefix = strip ? Values{prefix} : Values();
  Values own_proto{"http"};
  std::string addresses;
  if (stage.trusts) {
    const auto given = [&](const char *name, Values &ours) {
      if (sent.has_field(name)) { ours = sent.values(name); }
    };
    if (sent.has_field("forwarded")) { own_proto.clear(); }
    given("x-forwarded-host", own_host);
    given("x-forwarded-proto", own_proto);
    given("x-forwarded-prefix", own_prefix);
    for (const auto &value : sent.values("x-forwarded-for")) {
      if (!value.empty()) { addresses += value + ", "; }
    }
  }
  REQUIRE(got.values("x-forwarded-for") == Values{addresses + "127.0.0.1"},
          "another X-Forwarded-For");
  REQUIRE(got.values("x-forwarded-proto") == own_proto,
          "another X-Forwarded-Proto");
  REQUIRE(got.values("x-forwarded-host") == own_host,
          "another X-Forwarded-Host");
  REQUIRE(got.values("x-forwarded-prefix") == own_prefix,
          "another X-Forwarded-Prefix");
}

void check_connection(const reference::Head &sent, const reference::Head &got) {
  Values protocols;
  for (const auto &protocol : sent.list("upgrade")) {
    if (sent.upgrade() && protocol != "h2c" && !begins(protocol, "tls/")) {
      protocols.push_back(protocol);
    }
  }
  REQUIRE(got.list("upgrade") == protocols, "another Upgrade");
  const bool trailers =
      sent.minor == 1 && reference::has(sent.list("te"), "trailers");
  REQUIRE(got.list("te") == (trailers ? Values{"trailers"} : Values()),
          "another TE");
  for (const auto &option : got.list("connection")) {
    REQUIRE((option == "upgrade" && got.upgrade()) ||
                (option == "te" && trailers),
            "another Connection");
  }
  REQUIRE(got.upgrade() == sent.upgrade(), "another upgrade");
}

// WebDAV's Destination may lose the prefix, like the request target.
void check_destinations(const reference::Head &sent, const reference::Head &got,
                        const Stage &stage) {
  const auto &prefix = stage.prefix;
  const auto to_got = got.values("destination");
  auto to = sent.values("destination");
  if (hop_by_hop(sent, "destination")) { to.clear(); }
  REQUIRE(to.size() == to_got.size(), "another number of Destinations");
  for (std::size_t i = 0; i < to.size(); ++i) {
    bool right = to_got[i] == to[i];
    for (std::size_t at = 0; strips(sent, stage) && at < to[i].size(); ++at) {
      if (!begins(to[i].substr(at), prefix)) { continue; }
      auto without = to[i];
      without.erase(at, prefix.size());
      if (without.substr(at, 1) != "/") { without.insert(at, "/"); }
      right |= to_got[i] == without;
    }
    REQUIRE(right, "another Destination");
  }
}

// `got`: as it arrives at the target.
void check_request(const reference::Head &sent, const reference::Head &got,
                   const Stage &stage) {
  auto target = sent.target;
  if (strips(sent, stage)) { target.erase(0, stage.prefix.size()); }
  if (target.substr(0, 1) != "/" && target != "*") { target = "/" + target; }
  REQUIRE(got.method == sent.method, "another method");
  REQUIRE(got.target == target, "another request target");
  REQUIRE(got.authority.empty() && got.minor == 1, "another request line");
  REQUIRE(got.body.kind == sent.body.kind && got.body.size == sent.body.size,
          "another framing of the request");
  check_host(sent, got, stage);
  check_connection(sent, got);
  check_destinations(sent, got, stage);

  const auto checked = [](const std::string &name) { // above
    return name == "host" || name == "destination" || framing(name) ||
           name == "x-forwarded-for" || name == "x-forwarded-proto" ||
           name == "x-forwarded-host" || name == "x-forwarded-prefix";
  };
  const auto passes = [&](const std::string &name) {
    return !checked(name) && !reserved(name) &&
           (forwarding(name) ? stage.trusts : !hop_by_hop(sent, name)) &&
           !(name == "expect" && sent.minor == 0);
  };
  const auto arrives = [&](const std::string &name) {
    return !checked(name) && name != "connection" && name != "te" &&
           name != "upgrade";
  };
  REQUIRE(lines_that(sent, passes) == lines_that(got, arrives),
          "other header lines reach the target");
}

// What `cdn_cache` and `cors_origins` change.
bool replaceable(const std::string &name, const Stage &stage) {
  return !stage.prefix.empty() &&
         (name == "cache-control" || name == "cdn-cache-control" ||
          name == "vercel-cdn-cache-control" || name == "vary" ||
          begins(name, "access-control-allow-"));
}

// Location and Content-Location.
void check_location(const std::string &sent, const std::string &got,
                    const reference::Head &request, const Stage &stage) {
  const auto mark = sent.find("://");
  const auto scheme = sent.substr(0, mark == std::string::npos ? 0 : mark);
  const bool absolute = reference::scheme(scheme);
  const auto begin = absolute ? mark + 3 : 0;
  const auto end =
      absolute ? std::min(sent.find_first_of("/?#", begin), sent.size()) : 0;
  const auto authority = reference::lower(sent.substr(begin, end - begin));
  const auto path = sent.substr(end);
  const auto host = request.values("host")[0];
  const bool target = authority == "127.0.0.1:" + stage.target_port ||
                      authority == "localhost:" + stage.target_port ||
                      authority == "[::1]:" + stage.target_port ||
                      authority == host + ":" + stage.target_port;
  const auto prefix = strips(request, stage) ? stage.prefix : "";
  if (target) {
    // The target may lead to https of its own accord, and knows why.
    const auto leads = got.substr(0, got.find("://"));
    REQUIRE(leads == "http" ||
                (leads == scheme && reference::lower(scheme) != "http"),
            "another scheme");
    REQUIRE(got == leads + "://" + host + path ||
                got == leads + "://" + host + prefix + path,
            "a Location at the target's port");
  } else if (authority == host) {
    REQUIRE(got == sent || got == scheme + "://" + host + path ||
                got == scheme + "://" + host + prefix + path,
            "another Location at our host");
  } else {
    REQUIRE(got == sent || (begins(sent, "/") && !begins(sent, "//") &&
                            got == prefix + path),
            "another Location");
  }
}

// `sent` by the target, after the repair; `got`: as it arrives at the client.
void check_response(const reference::Head &sent, const reference::Head &got,
                    const reference::Head &request, const Stage &stage) {
  REQUIRE(got.reason == reference::sent_reason(sent.reason), "another status");
  REQUIRE(lengths(got) == lengths(sent), "another length");
  REQUIRE(
      got.values("transfer-encoding").size() ==
          (request.minor == 1 ? sent.values("transfer-encoding").size() : 0),
      "another transfer coding");
  const bool upgrade = sent.status == 101 || sent.status == 426;
  REQUIRE(got.list("upgrade") ==
              (upgrade ? sent.list("upgrade") : std::vector<std::string>()),
          "another Upgrade");
  for (const auto name : {"location", "content-location"}) {
    const auto to = sent.values(name), to_got = got.values(name);
    if (reference::has(sent.list("connection"), name)) { continue; }
    REQUIRE(to.size() == to_got.size(), "another number of Locations");
    for (std::size_t i = 0; i < to.size(); ++i) {
      check_location(to[i], to_got[i], request, stage);
    }
  }

  const auto elsewhere = [&](const std::string &name) { // checked or ours
    return name == "location" || name == "content-location" ||
           name == "server-timing" || name == "upgrade" || framing(name) ||
           replaceable(name, stage);
  };
  const auto passes = [&](const std::string &name) {
    return !elsewhere(name) && !hop_by_hop(sent, name);
  };
  const auto arrives = [&](const std::string &name) {
    return !elsewhere(name) && name != "connection";
  };
  REQUIRE(lines_that(sent, passes) == lines_that(got, arrives),
          "other header lines reach the client");

  // RFC 9111, section 3.5: what must never be marked as public.
  if (!reference::has(got.list("cache-control"), "s-maxage=60") ||
      reference::has(sent.list("cache-control"), "s-maxage=60")) {
    return;
  }
  const auto cache = sent.list("cache-control");
  const auto vary = sent.list("vary");
  REQUIRE(!stage.prefix.empty() && !request.has_field("authorization") &&
              !sent.has_field("set-cookie") &&
              !reference::has(vary, "cookie") && !reference::has(vary, "*") &&
              !reference::has(cache, "no-store") &&
              !reference::has(cache, "private") &&
              !reference::has(cache, "no-cache"),
          "a response is marked as public that must not be");
}

// ---- any bytes from the client ----------------------------------------------

// Whether no request can begin with these bytes: one whose head is incomplete
// must be refused then, and only then.
bool hopeless(Bytes bytes) {
  if (begins(bytes, "\x16\x03")) { return true; } // TLS
  while (begins(bytes, "\r\n")) {
    bytes.remove_prefix(2);
  }
  for (bool first = true;; first = false) {
    const auto end = bytes.find('\n');
    const bool whole = end != Bytes::npos;
    if (!whole && !first) { return false; }
    auto line = bytes.substr(0, end);
    if (!line.empty() && line.back() == '\r') {
      line.remove_suffix(1);
    } else if (whole) {
      return true; // a bare LF
    }
    if (whole && first) {
      if (!reference::request(std::string(line) + "\r\nHost: a\r\n\r\n")) {
        return true;
      }
    } else if (first) {
      const auto method = line.substr(0, line.find(' '));
      return !reference::token_chars(method) ||
             (method.empty() && !line.empty()) || !reference::clean(line) ||
             line.find('\t') != Bytes::npos ||
             std::count(line.begin(), line.end(), ' ') > 2;
    } else {
      const auto colon = line.find(':');
      if (colon == Bytes::npos || !reference::token(line.substr(0, colon)) ||
          !reference::clean(line)) {
        return true;
      }
    }
    bytes.remove_prefix(end + 1);
  }
}

class AnyClient : public Play {
public:
  AnyClient(Stage &s, const std::string &settings, std::string bytes)
      : Play(s), pieces_(split(std::move(bytes), pause_mark)),
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

  static constexpr int only_client = 1;

  static bool has(const std::string &settings, char c) {
    return settings.find(c) != std::string::npos;
  }

  // What the reference makes of all that the client sends.
  void foresee() {
    const auto all = joined(pieces_);
    Bytes bytes = all;
    for (;;) {
      while (begins(bytes, "\r\n")) {
        bytes.remove_prefix(2);
      }
      const auto text = reference::head_of(bytes, true);
      if (text.empty()) {
        ends_badly_ = hopeless(bytes) || bytes.size() > reference::max_head;
        break;
      }
      const auto head = reference::request(text);
      if (!head || text.size() > reference::max_head) {
        ends_badly_ = true;
        break;
      }
      bytes.remove_prefix(text.size());
      const auto body = reference::body(head->body, bytes);
      Expected request{*head, std::string(bytes.substr(0, body.size)),
                       head->keep_alive()};
      if (answered_here(*head)) {
        // At once, so that what follows cannot be told from a body.
        request.keep_alive &= !has_body(*head);
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
    return (head.method == "GET" && head.has_field("warmproxy-wait")) ||
           (!stage.prefix.empty() &&
            (path == "/status" ||
             (head.method == "OPTIONS" && head.has_field("origin") &&
              head.has_field("access-control-request-method"))));
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
      end.note_request(*head, only_client);
      arrived_.push_back({&end, std::string(text), *head});
      end.current = &arrived_.back();
    }
    auto &request = *end.current;
    const auto rest = bytes.substr(request.text.size());
    const auto body = reference::body(request.head.body, rest);
    REQUIRE(body.state != reference::State::wrong,
            "the target gets malformed chunks");
    request.raw_body = std::string(rest.substr(0, body.size));
    request.complete = body.state == reference::State::done;
    const bool grants = upgrades_ && request.head.upgrade();
    if (!request.answered && (request.complete || (early_ && !grants))) {
      answer(end, request, grants);
    }
    if (!request.complete || !end.open()) { return false; }
    end.read += request.text.size() + body.size;
    end.current = nullptr;
    if (end.tunnel) { end.tunnel_start = end.read; }
    return true;
  }

  void answer(TargetEnd &end, Arrived &request, bool grants) {
    request.answered = true;
    const auto number = "X-Answer: " + std::to_string(arrived_.size()) + "\r\n";
    if (grants) {
      end.tunnel = true;
      end.send({"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\n"
                "Upgrade: x\r\n" +
                number + "\r\n"});
      end.step(false);
      return;
    }
    const bool last = closes_ || says_close_;
    end.note_response(request.head, {}, !last, only_client);
    // The FIN goes along with the response: a pipelined POST may be sent before
    // a later one has arrived, and then it must fail. If something is left
    // unread, the end is a reset, which discards what is not sent yet.
    if (last && request.complete) { end.cork(); }
    end.send({"HTTP/1.1 200 OK\r\n" + number +
              (says_close_ ? "Connection: close\r\n" : "") +
              "Content-Length: 6\r\n\r\n" +
              (request.head.method == "HEAD" ? "" : "answer")});
    end.step(false);
    if (last) { end.close(true); }
  }

  void judge() {
    auto next = arrived_.begin();
    Bytes bytes = client->received;
    bool open = true;
    const TargetEnd *login = nullptr; // where the client was logged in
    for (const auto &expected : requests_) {
      const auto answer = take_answer(bytes, expected.head, *client);
      REQUIRE(answer.complete, "a request without an answer");
      const bool ours = answered_here(expected.head);
      REQUIRE(answer.ours() == ours,
              ours ? "handed over, where we should have answered"
                   : "answered by us, where it should be handed over");
      open = !answer.closes();
      const bool tunnel = answer.head.status == 101;
      if (ours) {
        REQUIRE(open == expected.keep_alive, "another keep-alive");
        if (!open) { break; }
        continue;
      }
      REQUIRE(next != arrived_.end() && next->answered,
              "an answer to a request that never arrived");
      REQUIRE(answer.head.values("x-answer") ==
                  std::vector<std::string>{std::to_string(
                      std::distance(arrived_.begin(), next) + 1)},
              "the answer to another request");
      REQUIRE(tunnel == (upgrades_ && expected.head.upgrade()),
              "another upgrade");
      // Some responses come before the body, which ends the connection. So does
      // the loss of a connection on which the client was logged in.
      const bool early = early_ && has_body(expected.head);
      if (!login && logs_in(expected.head)) { login = next->end; }
      const bool lost = login && (next->end != login || says_close_ ||
                                  expected.head.upgrade());
      REQUIRE(tunnel || (early && !open) ||
                  open == (expected.keep_alive && !lost),
              "another keep-alive");
      check_request(expected.head, next->head, stage);
      REQUIRE(begins(expected.raw_body, next->raw_body),
              "the target gets another body");
      // The target may itself have closed before it had read all of it.
      REQUIRE(next->raw_body == expected.raw_body ||
                  (early && (!open || closes_ || says_close_)),
              "the target gets a part of the body");
      ++next;
      if (!open) { break; }
    }
    if (open && partial_ && next != arrived_.end()) {
      REQUIRE(!next->complete, "a request that was never sent");
      check_request(partial_->head, next->head, stage);
      REQUIRE(begins(partial_->raw_body, next->raw_body),
              "the target gets another body");
      if (next->answered && !bytes.empty()) {
        const auto answer = take_answer(bytes, partial_->head, *client);
        REQUIRE(answer.complete, "a request without an answer");
        open = false;
      }
      ++next;
    }
    REQUIRE(next == arrived_.end(), "a request out of nowhere");

    for (const auto &end : targets) {
      REQUIRE(!end.tunnel || !tunnel_ ||
                  Bytes(end.received).substr(end.tunnel_start) == *tunnel_,
              "other bytes in the tunnel");
    }
    REQUIRE(!bytes.empty() || !ends_badly_ || !open,
            "closed without a refusal");
    if (!bytes.empty()) { judge_refusal(bytes, open); }
  }

  void judge_refusal(Bytes bytes, bool open) const {
    auto head_alone = bytes;
    const auto refusal = take_answer(bytes, {}, *client);
    // Where the method could be read, HEAD is answered without a body.
    reference::Head head_request;
    head_request.method = "HEAD";
    take_answer(head_alone, head_request, *client);
    REQUIRE(refusal.has_head && refusal.ours() && refusal.head.status >= 400 &&
                refusal.closes() && (bytes.empty() || head_alone.empty()),
            "bytes behind the last answer");
    REQUIRE(open && ends_badly_, "refused, where the reference accepts");
  }

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
  std::string method, version, lines, body;
};

const std::map<char, Known> &known_requests() {
  static const std::map<char, Known> all = {
      {'g', {"GET", "1.1", "", ""}},
      {'h', {"HEAD", "1.1", "", ""}},
      {'o', {"OPTIONS", "1.1", "", ""}},
      {'t', {"TRACE", "1.1", "", ""}},
      {'d', {"DELETE", "1.1", "", ""}},
      {'z', {"GET", "1.1", "Content-Length: 0\r\n", ""}},
      {'b', {"GET", "1.1", "Content-Length: 2\r\n", "ab"}},
      {'p', {"POST", "1.1", "Content-Length: 5\r\n", "hello"}},
      {'q',
       {"PUT", "1.1", "Transfer-Encoding: chunked\r\n",
        "5\r\nhello\r\n0\r\n\r\n"}},
      {'a', {"GET", "1.1", "Authorization: NTLM a\r\n", ""}},
      {'u', {"GET", "1.1", "Connection: Upgrade\r\nUpgrade: x\r\n", ""}},
      {'2',
       {"GET", "1.1",
        "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
        "HTTP2-Settings: a\r\n",
        ""}},
      {'0', {"GET", "1.0", "", ""}},
      {'1', {"GET", "1.0", "Connection: keep-alive\r\n", ""}},
      {'l', {"GET", "1.1", "Connection: close\r\n", ""}}};
  return all;
}

class AnyTarget : public Play {
public:
  AnyTarget(Stage &s, const std::string &requests,
            std::vector<std::string> answers)
      : Play(s), answers_(std::move(answers)) {
    std::size_t count = 0;
    for (const char c : requests) {
      const bool known = known_requests().count(c) > 0;
      if (c == 'n' || (known && count < 6)) { requests_ += c; }
      count += known;
    }
  }

  void run() {
    for (const char c : requests_) {
      if (client && (c == 'n' || client->ended)) { end_client(); }
      if (c == 'n') { continue; }
      if (!client) {
        connect();
        ++client_number_;
        begin_ = 0;
        login_ = nullptr;
      }
      ask(known_requests().at(c), c);
    }
    if (client) { end_client(); }
  }

private:
  struct Delivery {
    std::string bytes;     // of the response, all of them
    char end = 'k';        // what came behind
    TargetEnd *connection; // on which it came
    bool on_new;           // this was its first request
  };

  void end_client() {
    leave(answer_.head.status == 101);
    REQUIRE(client->received.size() == begin_, "bytes behind the answer");
    client.reset();
  }

  // Sends a request and judges the answer.
  void ask(const Known &request, char letter) {
    ++current_;
    const auto text = request.method + " " + stage.prefix + "/" + letter +
                      ".css HTTP/" + request.version +
                      "\r\nHost: a\r\nX-Number: " + std::to_string(current_) +
                      "\r\n" + request.lines + "\r\n";
    head_ = *reference::request(text);
    whole_ = false;
    deliveries_.clear();
    client->send({text + request.body});
    // What the target still has to send must not arrive during the next one.
    go_on([this] { return (whole_ && all_sent()) || client->ended; },
          "the client waits in vain");
    judge();
    if (!whole_ || answer_.head.status == 101) {
      begin_ = client->received.size();
      end_client();
      return;
    }
    if (answer_.closes() ||
        (head_.minor == 0 &&
         !reference::has(answer_.head.list("connection"), "keep-alive"))) {
      go_on([this] { return client->ended; }, "the connection stays open");
      REQUIRE(client->received.size() == begin_, "bytes behind the answer");
    }
  }

  bool all_sent() const {
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
    check_request(head_, *head, stage);
    end.note_request(*head, client_number_);
    deliver(end);
    return true;
  }

  void deliver(TargetEnd &end) {
    Delivery delivery{"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n", 'k', &end,
                      end.requests == 1};
    if (head_.method != "HEAD") { delivery.bytes += "ok"; }
    std::vector<std::string> pieces{delivery.bytes};
    if (next_ < answers_.size()) {
      auto part = answers_[next_++];
      const char how = part.empty() ? 'k' : part[0];
      part.erase(0, 1);
      pieces = split(part, pause_mark);
      delivery.bytes = joined(pieces);
      delivery.end = how == 'r' ? 'r' : how == 'c' ? 'c' : 'k';
    }
    const auto reading = read(delivery);
    // A response that has no end of its own needs one.
    if (delivery.end == 'k' && !reading.delimited) { delivery.end = 'c'; }
    end.note_response(head_, reading.head.value_or(reference::Head()),
                      delivery.end == 'k' && reading.lasts, client_number_);
    deliveries_.push_back(delivery);
    closing_[&end] = delivery.end;
    end.send(pieces);
    end.step(false);
  }

  // What the reference makes of a response.
  struct Reading {
    std::vector<reference::Head> interim;
    std::optional<reference::Head> head;
    reference::Decoded body;
    bool nothing = false;   // no byte that the client could have
    bool delimited = false; // complete without the end of the connection
    bool complete = false;
    bool lasts = false; // the connection, as far as we can see
    std::string tunnel;
  };

  Reading read(const Delivery &delivery) const {
    Reading reading;
    Bytes bytes = delivery.bytes;
    bool repaired = false;
    for (;;) {
      const auto text = reference::head_of(bytes, true);
      if (text.size() > reference::max_head) { return reading; }
      if (text.empty()) {
        reading.nothing =
            bytes.empty() && (reading.interim.empty() || head_.minor == 0);
        return reading;
      }
      const auto head = reference::response(text, head_.method, true);
      if (!head || (head->status == 101 && !head_.upgrade())) {
        return reading;
      }
      repaired |= needs_repair(text);
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
    reading.body = reference::body(reading.head->body, bytes, true);
    reading.delimited = reading.body.state == reference::State::done;
    reading.complete = reading.delimited || (reading.head->body.kind ==
                                                 reference::Body::until_close &&
                                             delivery.end != 'r');
    const auto body = bytes.substr(0, reading.body.size);
    reading.lasts =
        reading.delimited && reading.head->keep_alive() && !repaired &&
        bytes.size() == body.size() &&
        (reading.body.sent_on.empty() || reading.body.sent_on == body);
    return reading;
  }

  // Whether a strict reader would refuse this head, or doubt its framing.
  bool needs_repair(Bytes text) const {
    std::string proper; // a bare LF is no fault
    for (const char c : text) {
      if (c == '\n' && (proper.empty() || proper.back() != '\r')) {
        proper += '\r';
      }
      proper += c;
    }
    const auto head = reference::response(proper, head_.method, false);
    if (!head) { return true; }
    const auto codings = head->values("transfer-encoding");
    const auto lengths = head->values("content-length");
    const bool bodiless =
        head->status < 200 || head->status == 204 || head->status == 304;
    return codings.size() + lengths.size() > 1 ||
           (bodiless &&
            (!codings.empty() ||
             (!lengths.empty() && reference::decimal(lengths[0]) != 0u)));
  }

  void judge() {
    const auto all = Bytes(client->received).substr(begin_);
    begin_ = client->received.size() - rest(all).size();
    REQUIRE(!deliveries_.empty(), "an answer out of nowhere");
    judge_repetitions();
    const auto &last = deliveries_.back();
    const auto reading = read(last);

    // Interim answers are passed on, as far as we got.
    const auto expected_interim = head_.minor == 1 ? reading.interim.size() : 0;
    REQUIRE(answer_.interim.size() <= expected_interim,
            "more interim answers than there were");
    for (std::size_t i = 0; i < answer_.interim.size(); ++i) {
      check_response(reading.interim[i], answer_.interim[i], head_, stage);
    }

    if (!reading.head) {
      REQUIRE(answer_.has_head && answer_.ours() &&
                  answer_.head.status == 502 && answer_.complete,
              "no 502 for a response that the reference refuses");
      return;
    }
    if (!answer_.has_head) {
      REQUIRE(!reading.complete, "the answer was not passed on");
      return;
    }
    // The head came with a body that is malformed from its start.
    if (reading.body.state == reference::State::wrong && answer_.ours() &&
        answer_.head.status == 502) {
      REQUIRE(answer_.complete, "our answer was cut");
      return;
    }
    REQUIRE(answer_.interim.size() == expected_interim,
            "an interim answer was lost");
    check_response(*reading.head, answer_.head, head_, stage);
    judge_login(*reading.head, last.connection);
    if (reading.head->status == 101) {
      const auto tunnelled = all.substr(all.size() - rest(all).size());
      REQUIRE(!reading.complete || tunnelled == reading.tunnel,
              "other bytes in the tunnel");
      REQUIRE(begins(reading.tunnel, tunnelled), "other bytes in the tunnel");
      return;
    }
    REQUIRE(answer_.complete == reading.complete,
            reading.complete ? "the answer was cut"
                             : "a cut answer looks complete");
    const auto &content = answer_.body.content;
    REQUIRE(reading.complete ? content == reading.body.content
                             : begins(reading.body.content, content),
            "another content");
    REQUIRE(!reading.complete || head_.minor == 0 ||
                answer_.body.sent_on == reading.body.sent_on,
            "other chunks or trailers");
  }

  // Nothing that may change something is sent twice, nothing is sent more than
  // three times, or more than twice on a new connection.
  void judge_repetitions() const {
    const auto safe = {"GET", "HEAD", "OPTIONS", "TRACE"};
    const bool repeatable =
        !has_body(head_) &&
        std::find(safe.begin(), safe.end(), head_.method) != safe.end();
    int on_new = 0;
    for (std::size_t i = 0; i < deliveries_.size(); ++i) {
      on_new += deliveries_[i].on_new;
      if (i + 1 == deliveries_.size()) { break; }
      REQUIRE(repeatable, "a request was sent twice");
      const auto reading = read(deliveries_[i]);
      const bool was_late = reading.head && reading.head->status == 408 &&
                            !reading.head->keep_alive() &&
                            !deliveries_[i].on_new;
      REQUIRE(reading.nothing || was_late, "an answer was thrown away");
    }
    REQUIRE(deliveries_.size() <= 3 && on_new <= 2,
            "a request was sent too often");
    REQUIRE(!repeatable || on_new == 2 || deliveries_.size() == 3 ||
                !read(deliveries_.back()).nothing,
            "a request should have been sent again");
  }

  // Where a connection logged in the client, the next request goes out on it,
  // or the client's connection ends, too.
  void judge_login(const reference::Head &response, TargetEnd *connection) {
    REQUIRE(!login_ || login_ == connection || answer_.closes() ||
                answer_.head.status == 101 || client->ended,
            "the client does not notice that it is no longer logged in");
    if (logs_in(head_) || logs_in(response)) { login_ = connection; }
  }

  // What is behind the answer.
  Bytes rest(Bytes bytes) const {
    take_answer(bytes, head_, *client);
    return bytes;
  }

  const std::vector<std::string> answers_;
  std::string requests_; // letters

  std::size_t next_ = 0;       // of answers_
  int current_ = 0;            // the request's number
  int client_number_ = 0;      // of those that have connected
  std::size_t begin_ = 0;      // of the current answer, in what the client got
  reference::Head head_;       // of the current request
  TargetEnd *login_ = nullptr; // where the current client is logged in
  std::vector<Delivery> deliveries_;
  std::map<TargetEnd *, char> closing_;
  Answer answer_;
  bool whole_ = false;
};

} // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t *data,
                                      std::size_t size) {
  static auto &plain = *new Stage(Stage::Kind::plain);
  static auto &dressed = *new Stage(Stage::Kind::dressed);
  static auto &trusting = *new Stage(Stage::Kind::trusting);

  const std::string text(reinterpret_cast<const char *>(data), size);
  if (std::count(text.begin(), text.end(), pause_mark) > 8) { return 0; }
  const auto settings = text.substr(0, text.find(part_end));
  const char kind = settings.substr(0, 1)[0];
  const auto chosen = [&](char target_kind, char client_setting) {
    return kind == target_kind ||
           (kind == 'c' && settings.find(client_setting) != std::string::npos);
  };
  auto &stage = chosen('T', 'd')   ? dressed
                : chosen('F', 'p') ? trusting
                                   : plain;
  auto parts = split(
      replaced(replaced(text, "{port}", stage.target_port), "{big}", big()),
      part_end);
  if (parts.size() < 2 || joined(parts).size() > size + 250000) { return 0; }
  parts.erase(parts.begin());
  stage.leave_one_idle();
  if (kind == 'c') {
    AnyClient(stage, settings, parts[0]).run();
  } else if (kind == 't' || kind == 'T' || kind == 'F') {
    AnyTarget(stage, settings.substr(1), std::move(parts)).run();
  }
  return 0;
}
