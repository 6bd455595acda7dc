// Vercel's contract for a function of runtime `executable`, with the platform
// played by the test: the Unix socket, its messages, the headers, the signals.

#include "figures.hpp"

#include <sys/un.h>

#include <set>

using namespace support;

namespace {

// ---- JSON, to the letter (RFC 8259) -----------------------------------------

struct Json {
  enum Type { null, boolean, number, string, array, object } type = null;
  std::string text; // a number's digits, a string's bytes
  std::vector<std::pair<std::string, Json>> members;
  std::vector<Json> items;

  const Json &operator[](const std::string &name) const {
    for (const auto &m : members) {
      if (m.first == name) { return m.second; }
    }
    throw Error("no \"" + name + "\" in the message");
  }
  std::string as(Type wanted) const {
    if (type != wanted) { throw Error("of another type: " + text); }
    return text;
  }
};

class JsonReader {
public:
  explicit JsonReader(std::string_view text) : rest_(text) {}

  Json read_all() {
    auto value = read();
    if (!rest_.empty()) { wrong("something behind the message"); }
    return value;
  }

private:
  [[noreturn]] void wrong(const std::string &what) const {
    throw Error("not JSON: " + what + " at \"" +
                std::string(rest_.substr(0, 40)) + "\"");
  }
  bool skip(std::string_view token) {
    if (rest_.substr(0, token.size()) != token) { return false; }
    rest_.remove_prefix(token.size());
    return true;
  }
  void expect(std::string_view token) {
    if (!skip(token)) { wrong("no " + std::string(token)); }
  }

  Json read() {
    Json value;
    if (skip("{")) {
      value.type = Json::object;
      if (skip("}")) { return value; }
      do {
        auto name = read_string();
        expect(":");
        value.members.emplace_back(std::move(name), read());
      } while (skip(","));
      expect("}");
    } else if (skip("[")) {
      value.type = Json::array;
      if (skip("]")) { return value; }
      do {
        value.items.push_back(read());
      } while (skip(","));
      expect("]");
    } else if (rest_.substr(0, 1) == "\"") {
      value.type = Json::string;
      value.text = read_string();
    } else if (skip("true") || skip("false")) {
      value.type = Json::boolean;
    } else if (!skip("null")) {
      value.type = Json::number;
      if (skip("-")) { value.text = "-"; }
      const auto end = std::min(rest_.find_first_not_of("0123456789"),
                                rest_.size()); // integers are all we send
      if (end == 0 || (end > 1 && rest_[0] == '0')) { wrong("no value"); }
      value.text += rest_.substr(0, end);
      rest_.remove_prefix(end);
    }
    return value;
  }

  std::string read_string() {
    expect("\"");
    std::string text;
    while (!skip("\"")) {
      if (rest_.empty()) { wrong("a string without end"); }
      const auto c = static_cast<unsigned char>(rest_[0]);
      if (c < 0x20) { wrong("a control character in a string"); }
      if (skip("\\")) {
        static const std::map<char, char> plain{
            {'"', '"'},  {'\\', '\\'}, {'/', '/'},  {'b', '\b'},
            {'f', '\f'}, {'n', '\n'},  {'r', '\r'}, {'t', '\t'}};
        const auto escape = rest_.empty() ? '\0' : rest_[0];
        const auto found = plain.find(escape);
        if (found != plain.end()) {
          text += found->second;
          rest_.remove_prefix(1);
        } else if (skip("u")) {
          const std::string digits(rest_.substr(0, 4));
          if (digits.size() != 4 ||
              digits.find_first_not_of("0123456789abcdefABCDEF") !=
                  std::string::npos) {
            wrong("\\u without four digits");
          }
          const auto code = std::stoul(digits, nullptr, 16);
          if (code >= 0x100) { wrong("a code point that we never escape"); }
          if (code < 0x80) {
            text += static_cast<char>(code);
          } else {
            text += static_cast<char>(0xC0 | (code >> 6));
            text += static_cast<char>(0x80 | (code & 0x3F));
          }
          rest_.remove_prefix(4);
        } else {
          wrong("an unknown escape");
        }
      } else if (c < 0x80) {
        text += rest_[0];
        rest_.remove_prefix(1);
      } else {
        // UTF-8, its well-formed sequences up to U+FFFF
        const std::size_t size = c >= 0xC2 && c <= 0xDF   ? 2
                                 : c >= 0xE0 && c <= 0xEF ? 3
                                                          : 0;
        if (size == 0 || rest_.size() < size) { wrong("bytes, not UTF-8"); }
        for (std::size_t i = 1; i < size; ++i) {
          if ((rest_[i] & 0xC0) != 0x80) { wrong("bytes, not UTF-8"); }
        }
        text += rest_.substr(0, size);
        rest_.remove_prefix(size);
      }
    }
    return text;
  }

  std::string_view rest_;
};

// ---- the platform
// ------------------------------------------------------------

class Platform {
public:
  struct End {
    std::string invocation;
    std::string request; // the digits
  };

  Platform() : listener_(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    path().copy(address.sun_path, sizeof(address.sun_path) - 1);
    if (bind(listener_, reinterpret_cast<sockaddr *>(&address),
             sizeof(address)) != 0 ||
        listen(listener_, 8) != 0) {
      fail("the platform's socket");
    }
    thread_ = std::thread([this] { listen_to_all(); });
  }
  ~Platform() {
    ::shutdown(listener_, SHUT_RDWR);
    hang_up();
    thread_.join();
    ::close(listener_);
  }

  std::string path() const { return directory_ / "ipc.sock"; }

  // Everything that came so far. Throws if any of it was not what it should be.
  std::vector<Json> messages() const {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!error_.empty()) { throw Error(error_); }
    return messages_;
  }

  // The first message of that type, once it is there.
  Json message(const std::string &type) const {
    Json found;
    if (!wait_for([&] {
          for (const auto &m : messages()) {
            if (m["type"].as(Json::string) == type) {
              found = m;
              return true;
            }
          }
          return false;
        })) {
      throw Error("no message " + type);
    }
    return found;
  }

  std::size_t count(const std::string &type) const {
    std::size_t n = 0;
    for (const auto &m : messages()) {
      n += m["type"].as(Json::string) == type;
    }
    return n;
  }

  std::vector<End> ends() const {
    std::vector<End> all;
    for (const auto &m : messages()) {
      if (m["type"].as(Json::string) == "end") {
        const auto &context = m["payload"]["context"];
        all.push_back({context["invocationId"].as(Json::string),
                       context["requestId"].as(Json::number)});
      }
    }
    return all;
  }
  std::size_t ends_of(const std::string &invocation) const {
    std::size_t n = 0;
    for (const auto &end : ends()) {
      n += end.invocation == invocation;
    }
    return n;
  }
  bool ended(const std::string &invocation) const {
    return wait_for([&] { return ends_of(invocation) > 0; });
  }

  // Until the function has closed its end.
  bool closed() const {
    return wait_for([&] {
      std::lock_guard<std::mutex> lock(mutex_);
      return closed_;
    });
  }

  // Whether the platform stops reading.
  void pause(bool paused) { paused_ = paused; }

  // The platform goes away.
  void hang_up() {
    std::lock_guard<std::mutex> lock(mutex_);
    if (connection_ >= 0) { ::shutdown(connection_, SHUT_RDWR); }
  }

private:
  void listen_to_all() {
    int fd;
    while ((fd = accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC)) >= 0) {
      {
        std::lock_guard<std::mutex> lock(mutex_);
        if (closed_) { error_ = "the function connects a second time"; }
        connection_ = fd;
      }
      std::string buffer;
      char block[4096];
      ssize_t n;
      while (wait_for([&] { return !paused_; }) &&
             (n = recv(fd, block, sizeof(block), 0)) > 0) {
        buffer.append(block, static_cast<std::size_t>(n));
        std::size_t end;
        while ((end = buffer.find('\0')) != std::string::npos) {
          take(buffer.substr(0, end));
          buffer.erase(0, end + 1);
        }
      }
      std::lock_guard<std::mutex> lock(mutex_);
      if (!buffer.empty()) { error_ = "a message without its NUL: " + buffer; }
      connection_ = -1;
      closed_ = true;
      ::close(fd);
    }
  }

  void take(const std::string &text) {
    Json message;
    std::string error;
    try {
      message = JsonReader(text).read_all();
    } catch (const std::exception &e) { error = e.what(); }
    std::lock_guard<std::mutex> lock(mutex_);
    if (!error.empty()) {
      error_ = error + ", in \"" + text + "\"";
    } else {
      messages_.push_back(std::move(message));
    }
  }

  TemporaryDirectory directory_;
  const int listener_;
  std::thread thread_;
  mutable std::mutex mutex_;
  std::vector<Json> messages_;
  std::string error_;
  int connection_ = -1;
  bool closed_ = false;
  std::atomic<bool> paused_{false};
};

// build/warmproxy as a function. PORT=0 only so that tests can run side by
// side: the platform reads the port out of `server-started`.
struct Function {
  explicit Function(Environment environment = serve_fake())
      : process(built("warmproxy"), {}, complete(std::move(environment))) {
    const auto started = platform.message("server-started");
    port = std::stoi(started["payload"]["httpPort"].as(Json::number));
  }

  // As the platform sends it.
  Response request(const std::string &invocation,
                   const std::string &target = "/",
                   const std::string &extra = "") {
    return get(port, target, identified(invocation) + extra);
  }
  static std::string identified(const std::string &invocation,
                                const std::string &request = "1") {
    return "x-vercel-internal-invocation-id: " + invocation +
           "\r\nx-vercel-internal-request-id: " + request + "\r\n";
  }

  // Ends it; every invocation has then ended once, and these were all.
  void finish(std::multiset<std::string> invocations) {
    process.signal(SIGTERM);
    CHECK(process.wait() == 0);
    CHECK(platform.closed());
    std::multiset<std::string> ended;
    for (const auto &end : platform.ends()) {
      ended.insert(end.invocation);
    }
    CHECK(ended == invocations);
    CHECK(platform.count("server-started") == 1);
    CHECK(platform.messages().size() == ended.size() + 1);
  }

  Environment complete(Environment environment) {
    environment.emplace("VERCEL_IPC_PATH", platform.path());
    environment.emplace("PORT", "0");
    environment.emplace("PATH", environment_or("PATH", "/usr/bin:/bin"));
    environment.emplace("WARMPROXY_PREWARM", "0");
    return environment;
  }

  Platform platform;
  Process process;
  int port = 0;
};

// A function that is attached to a target in the test's process.
Environment serve_attached(const ScriptedTarget &target,
                           Environment more = {}) {
  more.insert({{"WARMPROXY_BINARY", "/bin/false"},
               {"WARMPROXY_ARGS", ""},
               {"WARMPROXY_TARGET_PORT", std::to_string(target.port())},
               {"WARMPROXY_HEALTH_PATH", ""}});
  return more;
}

Environment with(Environment environment, const std::string &name,
                 const std::string &value) {
  environment[name] = value;
  return environment;
}

} // namespace

TEST_CASE("vercel: server-started is sent once, before the target runs") {
  TemporaryDirectory directory;
  const auto starts = directory / "starts";
  Function function(serve_fake({"--count-file", starts}));
  const auto message = function.platform.message("server-started");
  CHECK(message.members.size() == 2);
  const auto &payload = message["payload"];
  CHECK(payload.members.size() == 2);
  CHECK(std::stol(payload["initDuration"].as(Json::number)) >= 0);
  CHECK(listening(function.port));
  CHECK(read_file(starts).empty());

  CHECK(function.request("a").status == 200);
  CHECK(lines_of(read_file(starts)).size() == 1);
  CHECK(function.request("b").status == 200);
  CHECK(lines_of(read_file(starts)).size() == 1);
  function.finish({"a", "b"});
}

TEST_CASE("vercel: listens on 127.0.0.1 only") {
  Function function;
  char expected[16];
  std::snprintf(expected, sizeof(expected), "0100007F:%04X",
                static_cast<unsigned>(function.port));
  CHECK(read_file("/proc/net/tcp").find(expected) != std::string::npos);
  std::snprintf(expected, sizeof(expected), ":%04X",
                static_cast<unsigned>(function.port));
  CHECK(read_file("/proc/net/tcp6").find(expected) == std::string::npos);
}

TEST_CASE("vercel: the default port is 3000") {
  // It may be taken; then the error names it.
  Platform platform;
  auto environment = serve_fake();
  environment["VERCEL_IPC_PATH"] = platform.path();
  Process process(built("warmproxy"), {}, environment);
  REQUIRE(wait_for([&] { return !platform.messages().empty(); }));
  const auto first = platform.messages().front();
  if (first["type"].as(Json::string) == "server-started") {
    CHECK(first["payload"]["httpPort"].as(Json::number) == "3000");
  } else {
    CHECK(first["payload"]["message"].as(Json::string).find(":3000") !=
          std::string::npos);
    CHECK(process.wait() == 1);
  }
}

TEST_CASE("vercel: every invocation ends once, whatever the response") {
  Function function;
  {
    RawClient client(function.port);
    for (const char *id : {"1", "2", "3"}) {
      CHECK(client.get("/", Function::identified(id)).status == 200);
      CHECK(function.platform.ended(id)); // while the connection stays
    }
    CHECK(client
              .exchange("HEAD / HTTP/1.1\r\nHost: x\r\n" +
                        Function::identified("head") + "\r\n")
              .status == 200);
    CHECK(client.post("/echo", "hello", Function::identified("post")).status ==
          200);
    CHECK(client.get("/none", Function::identified("404")).status == 404);
    CHECK(client.get("/chunked?n=300000", Function::identified("chunked"))
              .body.size() == 300000);
    CHECK(client.get("/close?n=300000", Function::identified("close"))
              .body.size() == 300000);
  }
  { // two in one packet
    RawClient client(function.port);
    client.send("GET / HTTP/1.1\r\nHost: x\r\n" + Function::identified("p1") +
                "\r\nGET /none HTTP/1.1\r\nHost: x\r\n" +
                Function::identified("p2") + "\r\n");
    CHECK(client.read_response().status == 200);
    CHECK(client.read_response().status == 404);
  }
  { // the response comes before the request is complete
    RawClient client(function.port);
    client.send("POST /early413 HTTP/1.1\r\nHost: x\r\nContent-Length: "
                "20000000\r\n" +
                Function::identified("early") + "\r\nsome of it");
    CHECK(client.read_response().status == 413);
    CHECK(function.platform.ended("early"));
  }
  function.finish({"1", "2", "3", "head", "post", "404", "chunked", "close",
                   "p1", "p2", "early"});
}

TEST_CASE("vercel: an invocation does not end before its response") {
  Gate gate;
  ScriptedTarget target([&](TargetConnection &c) {
    while (!c.read_head().empty()) {
      c.send("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nfirst");
      gate.wait();
      c.send(" half");
    }
  });
  Function function(serve_attached(target));
  RawClient client(function.port);
  client.send("GET / HTTP/1.1\r\nHost: x\r\n" + Function::identified("slow") +
              "\r\n");
  client.read_until("first");
  CHECK(function.platform.ends().empty());
  gate.open();
  CHECK(client.read_exact(5) == " half");
  CHECK(function.platform.ended("slow"));
  function.finish({"slow"});
}

TEST_CASE("vercel: an invocation ends once, whatever fails") {
  SUBCASE("the target cannot be started") {
    Function function(serve_fake({"--exit-now", "3"}));
    CHECK(function.request("502").status == 502);
    CHECK(function.request("503").status == 503); // within the pause
    function.finish({"502", "503"});
  }
  SUBCASE("it is not up in time") {
    Function function(with(serve_fake({"--never-listen"}),
                           "WARMPROXY_STARTUP_TIMEOUT", "200ms"));
    CHECK(function.request("504").status == 504);
    function.finish({"504"});
  }
  SUBCASE("it dies before its response") {
    Function function;
    // Repeated on the next one, which dies of it, too.
    CHECK(function.request("crash", "/crash").status >= 502);
    function.finish({"crash"});
  }
  SUBCASE("it dies within its response") {
    Function function;
    CHECK(!function.request("half", "/crash-mid").complete);
    CHECK(function.platform.ended("half"));
    function.finish({"half"});
  }
  SUBCASE("its response is malformed") {
    ScriptedTarget target(answering("what?\r\n\r\n"));
    Function function(serve_attached(target));
    CHECK(function.request("nonsense").status == 502);
    function.finish({"nonsense"});
  }
  SUBCASE("the waiting page") {
    Function function(with(serve_fake({"--ready-after", "600000"}),
                           "WARMPROXY_WAITING_PAGE_AFTER", "10ms"));
    CHECK(function
              .request("page", "/",
                       "Sec-Fetch-Dest: document\r\nAccept: text/html\r\n")
              .status == 503);
    function.finish({"page"});
  }
}

TEST_CASE("vercel: an invocation ends once when its client disconnects") {
  SUBCASE("before the target is up") {
    TemporaryDirectory directory;
    const auto starts = directory / "starts";
    Function function(
        serve_fake({"--ready-after", "600000", "--count-file", starts}));
    {
      RawClient client(function.port);
      client.send("GET / HTTP/1.1\r\nHost: x\r\n" +
                  Function::identified("gone") + "\r\n");
      CHECK(wait_for([&] { return !read_file(starts).empty(); }));
    }
    CHECK(function.platform.ended("gone"));
    function.finish({"gone"});
  }
  SUBCASE("in the middle of a stream") {
    TemporaryDirectory directory;
    Function function;
    {
      RawClient client(function.port);
      client.send("GET /sse?n=2&gate=" + (directory / "gate") +
                  " HTTP/1.1\r\nHost: x\r\n" + Function::identified("left") +
                  "\r\n");
      client.read_until("data:");
      CHECK(function.platform.ends().empty());
      client.reset();
    }
    CHECK(function.platform.ended("left"));
    function.finish({"left"});
  }
  SUBCASE("in the middle of its upload") {
    Function function;
    {
      RawClient client(function.port);
      client.send("POST /upload HTTP/1.1\r\nHost: x\r\nContent-Length: "
                  "1000000\r\n" +
                  Function::identified("cut") + "\r\n");
      client.send_generated(1000);
      CHECK(function.process.printed("target up"));
      client.reset();
    }
    CHECK(function.platform.ended("cut"));
    function.finish({"cut"});
  }
}

TEST_CASE("vercel: an upgrade ends its invocation at once, the tunnel stays") {
  Function function;
  const std::string upgrade = "GET /ws HTTP/1.1\r\nHost: x\r\nConnection: "
                              "Upgrade\r\nUpgrade: thing\r\n";
  RawClient client(function.port);
  client.send(upgrade + Function::identified("ws") + "\r\n");
  CHECK(client.read_response().status == 101);
  CHECK(function.platform.ended("ws"));
  for (const char *word : {"one", "two", "three"}) {
    client.send(word);
    CHECK(client.read_exact(std::strlen(word)) == word);
  }
  client.shutdown_write();
  CHECK(client.at_end());

  // Refused, it is a request like any other.
  CHECK(get(function.port, "/none",
            "Connection: Upgrade\r\nUpgrade: thing\r\n" +
                Function::identified("refused"))
            .status == 404);
  function.finish({"ws", "refused"});
}

TEST_CASE("vercel: messages never interleave") {
  ScriptedTarget target(answering(ok()));
  Function function(serve_attached(target));
  constexpr int clients = 64, each = 20;
  std::multiset<std::string> invocations;
  std::atomic<int> good{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < clients; ++i) {
    std::vector<std::string> ids;
    for (int j = 0; j < each; ++j) {
      ids.push_back("iad1::" + std::to_string(i) + "-" + std::to_string(j) +
                    std::string(static_cast<std::size_t>(i * 7), 'x'));
      invocations.insert(ids.back());
    }
    threads.emplace_back([&function, &good, ids] {
      RawClient client(function.port);
      for (const auto &id : ids) {
        good += client.get("/", Function::identified(id)).status == 200;
      }
    });
  }
  for (auto &thread : threads) {
    thread.join();
  }
  CHECK(good == clients * each);
  function.finish(invocations);
}

TEST_CASE("vercel: identifiers are reported unchanged") {
  ScriptedTarget target(answering(ok()));
  Function function(serve_attached(target));
  const auto end_of = [&](const std::string &headers) {
    const auto before = function.platform.ends().size();
    CHECK(get(function.port, "/", headers).status == 200);
    REQUIRE(wait_for([&] { return function.platform.ends().size() > before; }));
    return function.platform.ends().back();
  };
  const auto request_id = [&](const std::string &id) {
    return end_of(Function::identified("x", id)).request;
  };
  CHECK(request_id("0") == "0");
  CHECK(request_id("42") == "42");
  CHECK(request_id("18446744073709551615") == "18446744073709551615");
  CHECK(request_id("18446744073709551616") == "0");
  CHECK(request_id("-1") == "0");
  CHECK(request_id("1.5") == "0");
  CHECK(request_id("seven") == "0");
  CHECK(request_id("") == "0");
  CHECK(end_of("X-Vercel-Internal-Invocation-Id: upper\r\n").request == "0");

  const auto invocation = [&](const std::string &id) {
    return end_of(Function::identified(id)).invocation;
  };
  CHECK(invocation("fra1::abc-123_x/y") == "fra1::abc-123_x/y");
  CHECK(invocation("say \"hi\" \\ back") == "say \"hi\" \\ back");
  CHECK(invocation("a\tb") == "a\tb");
  invocation("obs-text \xff\xfe, cut \xc3"); // it only has to be valid JSON
  invocation("\xc3\xa9t\xc3\xa9");
  CHECK(function.platform.ends().size() == 14);
  CHECK(function.platform.count("end") == 14);

  // A request without an invocation has no end.
  CHECK(get(function.port).status == 200);
  CHECK(get(function.port, "/", "x-vercel-internal-request-id: 9\r\n").status ==
        200);
  function.process.signal(SIGTERM);
  CHECK(function.process.wait() == 0);
  CHECK(function.platform.closed());
  CHECK(function.platform.ends().size() == 14);
}

TEST_CASE("vercel: a ping gets its response without the target") {
  TemporaryDirectory directory;
  const auto starts = directory / "starts";
  Function function(serve_fake({"--count-file", starts}));
  {
    RawClient client(function.port);
    for (const char *target : {"/_vercel/ping", "/_vercel/ping?x=1",
                               "http://example.org/_vercel/ping"}) {
      const auto response = client.get(target, Function::identified("ping"));
      CHECK(response.status == 200);
      CHECK(response.body == "OK");
    }
    const auto head =
        client.exchange("HEAD /_vercel/ping HTTP/1.1\r\nHost: x\r\n\r\n");
    CHECK(head.status == 200);
    CHECK(read_file(starts).empty());

    // Similar paths are the target's.
    for (const char *target :
         {"/_vercel/ping/", "/_vercel/pings", "/_vercel", "/x/_vercel/ping"}) {
      CHECK(client.get(target, Function::identified(target)).status == 404);
    }
  }
  CHECK(lines_of(read_file(starts)).size() == 1);
  function.finish(
      {"/_vercel/ping/", "/_vercel/pings", "/_vercel", "/x/_vercel/ping"});
}

TEST_CASE("vercel: a ping ignores the route prefix") {
  Function function(
      with(with(serve_fake(), "VERCEL_SERVICE_ROUTE_PREFIX", "/x"),
           "VERCEL_SERVICE_ROUTE_PREFIX_STRIP", "1"));
  CHECK(function.request("ping", "/_vercel/ping").body == "OK");
  CHECK(function.request("prefixed", "/x/_vercel/ping").status == 404);
  function.finish({"prefixed"});
}

TEST_CASE("vercel: internal headers are removed, others forwarded") {
  ScriptedTarget target(answering(ok()));
  const std::string internal = Function::identified("a") +
                               "X-Vercel-Internal-Span-Id: s\r\n"
                               "x-vercel-internal-trace-id: t\r\n"
                               "X-VERCEL-INTERNAL-ANYTHING: 1\r\n"
                               "x-vercel-sc-headers: {\"a\":1}\r\n"
                               "X-Vercel-Sc-Host: cache\r\n";
  const std::string others = "x-vercel-id: fra1::x\r\n"
                             "x-vercel-ip-country: DE\r\n"
                             "x-forwarded-for: 192.0.2.7\r\n"
                             "x-forwarded-host: example.org\r\n"
                             "x-forwarded-proto: https\r\n"
                             "x-real-ip: 192.0.2.7\r\n";
  Function function(serve_attached(target));
  CHECK(function.request("a", "/", internal + others).status == 200);
  CHECK(target.request(0).head ==
        "GET / HTTP/1.1\r\nHost: example.org\r\n" + others + "\r\n");

  // What the platform did not send is filled in.
  CHECK(get(function.port).status == 200);
  const auto head = target.request(1).head;
  CHECK(header_of(head, "X-Forwarded-For") == "127.0.0.1");
  CHECK(header_of(head, "X-Forwarded-Host") == "test");
  CHECK(header_of(head, "X-Forwarded-Proto") == "http");
}

TEST_CASE("vercel: the route prefix is removed on a segment boundary") {
  ScriptedTarget target(answering(ok()));
  std::size_t requests = 0;
  const auto seen = [&](Function &function, const std::string &path) {
    CHECK(function.request("x", path).status == 200);
    return target.request(requests++).head;
  };
  const auto target_of = [](const std::string &head) {
    const auto begin = head.find(' ') + 1;
    return head.substr(begin, head.find(' ', begin) - begin);
  };
  const auto function_with = [&](const std::string &prefix,
                                 const std::string &strip) {
    return std::make_unique<Function>(
        serve_attached(target, {{"VERCEL_SERVICE_ROUTE_PREFIX", prefix},
                                {"VERCEL_SERVICE_ROUTE_PREFIX_STRIP", strip}}));
  };

  SUBCASE("where it stands at the front") {
    const auto function = function_with("/svc", "1");
    const std::vector<std::pair<std::string, std::string>> expected{
        {"/svc", "/"},
        {"/svc/", "/"},
        {"/svc?x=1", "/?x=1"},
        {"/svc/a/b?c=/svc/d", "/a/b?c=/svc/d"},
        {"/svc/%2Fa%20b", "/%2Fa%20b"},
        {"/svc/svc/a", "/svc/a"},
    };
    for (const auto &e : expected) {
      const auto head = seen(*function, e.first);
      CHECK(target_of(head) == e.second);
      CHECK(header_of(head, "X-Forwarded-Prefix") == "/svc");
    }
    for (const std::string path :
         {"/svcs", "/svc-2/a", "/a/svc", "/SVC/a", "/%73vc/a", "/?/svc", "/"}) {
      const auto head = seen(*function, path);
      CHECK(target_of(head) == path);
      CHECK(count_of(headers_of(head), "X-Forwarded-Prefix") == 0);
    }
  }
  SUBCASE("however it is written") {
    for (const std::string prefix : {"svc", "/svc/", " /svc ", "/svc//"}) {
      CAPTURE(prefix);
      CHECK(target_of(seen(*function_with(prefix, "true"), "/svc/a")) == "/a");
    }
  }
  SUBCASE("or not at all") {
    for (const std::string prefix : {"", "/", " "}) {
      CAPTURE(prefix);
      CHECK(target_of(seen(*function_with(prefix, "1"), "/svc/a")) == "/svc/a");
    }
  }
  SUBCASE("if the platform asks for it") {
    for (const std::string strip : {"1", "true", "TRUE", " True "}) {
      CAPTURE(strip);
      CHECK(target_of(seen(*function_with("/svc", strip), "/svc/a")) == "/a");
    }
    for (const std::string strip : {"", "0", "false", "yes"}) {
      CAPTURE(strip);
      CHECK(target_of(seen(*function_with("/svc", strip), "/svc/a")) ==
            "/svc/a");
    }
  }
  SUBCASE("unless WARMPROXY_STRIP_PREFIX is set") {
    Function function(
        serve_attached(target, {{"WARMPROXY_STRIP_PREFIX", "/own"},
                                {"VERCEL_SERVICE_ROUTE_PREFIX", "/svc"},
                                {"VERCEL_SERVICE_ROUTE_PREFIX_STRIP", "1"}}));
    CHECK(target_of(seen(function, "/own/a")) == "/a");
    CHECK(target_of(seen(function, "/svc/a")) == "/svc/a");
  }
}

TEST_CASE("vercel: an unrecoverable error is reported") {
  const auto failing = [](Environment environment) {
    Platform platform;
    environment.emplace("VERCEL_IPC_PATH", platform.path());
    environment.emplace("PORT", "0");
    Process process(built("warmproxy"), {}, environment);
    const auto status = process.wait();
    CHECK(platform.closed());
    const auto messages = platform.messages();
    REQUIRE(messages.size() == 1);
    CHECK(messages[0]["type"].as(Json::string) == "unrecoverable-error");
    const auto &payload = messages[0]["payload"];
    CHECK(payload["exitCode"].as(Json::number) == std::to_string(status));
    const auto message = payload["message"].as(Json::string);
    CHECK(process.err().find(message) != std::string::npos);
    return std::make_pair(status, message);
  };
  const auto contains = [](const std::string &text, const std::string &part) {
    CAPTURE(text);
    CHECK(text.find(part) != std::string::npos);
  };

  auto [status, message] = failing({{"WARMPROXY_BINARY", "./no \"such\" one"}});
  CHECK(status == 2);
  contains(message, "no \"such\" one");

  std::tie(status, message) =
      failing(with(serve_fake(), "WARMPROXY_IDLE_STOP", "soon"));
  CHECK(status == 2);
  contains(message, "WARMPROXY_IDLE_STOP");
  contains(message, "soon");

  ScriptedTarget taken(answering(ok()));
  std::tie(status, message) =
      failing(with(serve_fake(), "PORT", std::to_string(taken.port())));
  CHECK(status == 1);
  contains(message, std::to_string(taken.port()));
}

TEST_CASE("vercel: the target's environment") {
  auto environment = serve_fake();
  environment.insert({{"VERCEL", "1"}, {"VERCEL_ENV", "production"}});
  SUBCASE("HOME and TMPDIR, where it has none") {
    Function function(environment);
    const auto lines = lines_of(function.request("env", "/env").body);
    const std::set<std::string> all(lines.begin(), lines.end());
    CHECK(all.count("HOME=/tmp") == 1);
    CHECK(all.count("TMPDIR=/tmp") == 1);
    CHECK(all.count("VERCEL=1") == 1);
    CHECK(all.count("VERCEL_ENV=production") == 1);
    for (const auto &line : lines) {
      CHECK(line.compare(0, 15, "VERCEL_IPC_PATH") != 0);
      CHECK(line.compare(0, 10, "WARMPROXY_") != 0);
    }
    // Nor the socket itself.
    CHECK(function.request("fds", "/fds").body.find("ipc") ==
          std::string::npos);
    const auto target = std::stoi(function.request("pid", "/pid").body);
    for (int fd = 3; fd < 64; ++fd) {
      char name[64] = "";
      const auto path = proc_file(target, "fd") + "/" + std::to_string(fd);
      if (readlink(path.c_str(), name, sizeof(name) - 1) < 0) { continue; }
      CAPTURE(name);
      for (int ours = 3; ours < 64; ++ours) {
        char other[64] = "";
        const auto at = proc_file(function.process.pid(), "fd") + "/" +
                        std::to_string(ours);
        if (readlink(at.c_str(), other, sizeof(other) - 1) < 0) { continue; }
        CHECK(std::string(name) != other);
      }
    }
  }
  SUBCASE("its own, where it has them") {
    environment.insert({{"HOME", "/root"}, {"TMPDIR", "/var/tmp"}});
    Function function(environment);
    const auto body = "\n" + function.request("env", "/env").body;
    CHECK(body.find("\nHOME=/root\n") != std::string::npos);
    CHECK(body.find("\nTMPDIR=/var/tmp\n") != std::string::npos);
  }
}

TEST_CASE("vercel: a refused connection ends its invocation, too") {
  auto environment = serve_fake();
  environment["WARMPROXY_MAX_CONNECTIONS"] = "4";
  Function function(environment);
  std::list<RawClient> inside;
  for (int i = 0; i < 4; ++i) {
    inside.emplace_back(function.port);
    inside.back().send("GET /sse?n=2&gate=/never HTTP/1.1\r\nHost: x\r\n\r\n");
    inside.back().read_until("data: 1");
  }
  CHECK(function.request("refused").status == 503);
  CHECK(function.platform.ended("refused"));
  inside.clear();
  function.finish({"refused"});
}

TEST_CASE("vercel: a platform that does not read delays no request") {
  Function function;
  function.platform.pause(true);
  // More than any socket has room for.
  const std::size_t count = 3000;
  const std::string name(400, 'i');
  RawClient client(function.port);
  for (std::size_t i = 0; i < count; ++i) {
    client.send("GET /pid HTTP/1.1\r\nHost: x\r\n" +
                Function::identified(name + std::to_string(i)) + "\r\n");
    CHECK(client.read_response().status == 200);
  }
  CHECK(get(function.port, "/_vercel/ping").status == 200);
  SUBCASE("and gets all messages in the end") {
    function.platform.pause(false);
    CHECK(wait_for([&] { return function.platform.count("end") == count; }));
    client.close();
    function.process.signal(SIGTERM);
  }
  SUBCASE("and does not delay the stop") {
    client.close();
    function.process.signal(SIGTERM);
    CHECK(function.process.wait() == 0);
    function.platform.hang_up();
    function.platform.pause(false);
  }
  CHECK(function.process.wait() == 0);
}

TEST_CASE("vercel: runs without the platform") {
  SUBCASE("not there") {
    ServeProcess process(
        with(serve_fake(), "VERCEL_IPC_PATH", "/nowhere/ipc.sock"));
    CHECK(get(process.port()).status == 200);
    CHECK(get(process.port(), "/_vercel/ping").status == 404);
    process.signal(SIGTERM);
    CHECK(process.wait() == 0);
  }
  SUBCASE("there, with a full backlog") {
    TemporaryDirectory directory;
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    (directory / "ipc.sock").copy(address.sun_path, sizeof(address.sun_path));
    const auto *place = reinterpret_cast<const sockaddr *>(&address);
    std::list<Socket> sockets;
    const auto add = [&] {
      const int type = SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC;
      return sockets.emplace_back(socket(AF_UNIX, type, 0)).fd();
    };
    const int listener = add();
    REQUIRE(bind(listener, place, sizeof(address)) == 0);
    REQUIRE(listen(listener, 0) == 0);
    while (connect(add(), place, sizeof(address)) == 0) {}
    ServeProcess process(
        with(serve_fake(), "VERCEL_IPC_PATH", directory / "ipc.sock"));
    CHECK(process.printed("cannot connect to Vercel"));
    CHECK(get(process.port()).status == 200);
    process.signal(SIGTERM);
    CHECK(process.wait() == 0);
  }
  SUBCASE("gone while we serve") {
    Function function;
    CHECK(function.request("before").status == 200);
    CHECK(function.platform.ended("before"));
    function.platform.hang_up();
    CHECK(function.platform.closed());
    CHECK(function.request("after").status == 200);
    CHECK(function.request("after").status == 200);
    for (int i = 0; i < 3; ++i) { // on a busy machine, one that spins may rest
      CHECK(rests(function.process.pid()));
    }
    function.process.signal(SIGTERM);
    CHECK(function.process.wait() == 0);
  }
  SUBCASE("gone before any message") {
    Platform platform;
    Process process(
        built("warmproxy"), {},
        {{"VERCEL_IPC_PATH", platform.path()}, {"WARMPROXY_BINARY", "./none"}});
    CHECK(process.wait() == 2);
  }
}

// The platform kills it 500 ms after SIGTERM. What is checked is that it does
// not take the seconds that it may take elsewhere.
// Until then the instance is not frozen, and what the program does after its
// response goes on.
TEST_CASE("vercel: background work delays the end of an invocation") {
  const std::string post = "POST /echo HTTP/1.1\r\nHost: x\r\n"
                           "Content-Length: 0\r\n" +
                           Function::identified("post") + "\r\n";
  SUBCASE("of one that may have changed something") {
    Function function(with(serve_fake(), "WARMPROXY_BACKGROUND_WORK", "10m"));
    CHECK(RawClient(function.port).exchange(post).status == 200);
    for (const std::string method : {"GET", "HEAD", "OPTIONS", "TRACE"}) {
      CAPTURE(method);
      RawClient client(function.port);
      CHECK(client
                .exchange(method + " /pid HTTP/1.1\r\nHost: x\r\n" +
                          Function::identified(method) + "\r\n")
                .status == 200);
      CHECK(function.platform.ended(method));
    }
    CHECK(function.platform.ends_of("post") == 0);
    // Cut short by SIGTERM.
    function.finish({"post", "GET", "HEAD", "OPTIONS", "TRACE"});
  }
  SUBCASE("by as much as was set") {
    Function function(with(serve_fake(), "WARMPROXY_BACKGROUND_WORK", "200ms"));
    const auto began = Clock::now();
    CHECK(RawClient(function.port).exchange(post).status == 200);
    CHECK(function.platform.ended("post"));
    CHECK(Clock::now() - began >= Milliseconds(200));
    function.finish({"post"});
  }
}

TEST_CASE("vercel: SIGTERM leaves little time") {
  constexpr Milliseconds much_less_than_elsewhere{5000};
  const std::string mark = "TEST_MARK=" + std::to_string(getpid());
  const auto finished = [&](Function &function) {
    const auto status = function.process.wait(much_less_than_elsewhere);
    CHECK(wait_for([&] { return processes_with(mark).empty(); }));
    return status;
  };
  const auto marked = [&](Environment environment) {
    environment["TEST_MARK"] = std::to_string(getpid());
    return environment;
  };

  SUBCASE("a request that is nearly done") {
    Gate gate;
    ScriptedTarget target([&](TargetConnection &c) {
      while (!c.read_head().empty()) {
        gate.wait();
        c.send(ok());
      }
    });
    Function function(serve_attached(target));
    RawClient client(function.port);
    client.send("GET / HTTP/1.1\r\nHost: x\r\n" + Function::identified("a") +
                "\r\n");
    target.request();
    function.process.signal(SIGTERM);
    CHECK(function.process.printed("stopping"));
    gate.open();
    const auto response = client.read_response();
    CHECK(response.status == 200);
    CHECK(response.complete);
    CHECK(finished(function) == 0);
    CHECK(function.platform.ends_of("a") == 1);
  }
  SUBCASE("a stream, a tunnel, and a target that ignores SIGTERM") {
    TemporaryDirectory directory;
    Function function(marked(serve_fake({"--ignore-term", "--fork-worker"})));
    RawClient stream(function.port), tunnel(function.port);
    stream.send("GET /sse?n=2&gate=" + (directory / "gate") +
                " HTTP/1.1\r\nHost: x\r\n" + Function::identified("stream") +
                "\r\n");
    stream.read_until("data:");
    tunnel.send("GET /ws HTTP/1.1\r\nHost: x\r\nConnection: "
                "Upgrade\r\nUpgrade: thing\r\n" +
                Function::identified("tunnel") + "\r\n");
    CHECK(tunnel.read_response().status == 101);
    function.process.signal(SIGTERM);
    CHECK(finished(function) == 0);
    CHECK(function.platform.closed());
    CHECK(function.platform.ends_of("stream") == 1);
    CHECK(function.platform.ends_of("tunnel") == 1);
  }
  SUBCASE("a start") {
    TemporaryDirectory directory;
    const auto starts = directory / "starts";
    Function function(marked(
        serve_fake({"--ready-after", "600000", "--count-file", starts})));
    RawClient client(function.port);
    client.send("GET / HTTP/1.1\r\nHost: x\r\n" + Function::identified("a") +
                "\r\n");
    CHECK(wait_for([&] { return !read_file(starts).empty(); }));
    function.process.signal(SIGTERM);
    CHECK(finished(function) == 0);
    CHECK(function.platform.closed());
    CHECK(function.platform.ends_of("a") == 1);
  }
  SUBCASE("directly after server-started") {
    for (int i = 0; i < 20; ++i) {
      Function function;
      function.process.signal(SIGTERM);
      CHECK(finished(function) == 0);
    }
  }
}
