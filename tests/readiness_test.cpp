// When the target counts as ready, where it is found, when it is given up, and
// what time counts.

#include "figures.hpp"

using namespace support;

namespace {

using Strings = std::vector<std::string>;

bool has(const std::string &text, const std::string &part) {
  return text.find(part) != std::string::npos;
}

std::string pid_line(const RunningProxy &proxy) {
  return std::to_string(proxy.status().pid) + "\n";
}

// Whether this is the response of the proxy's target to GET /pid.
bool is_served(const RunningProxy &proxy, const Response &response) {
  return response.status == 200 && response.body == pid_line(proxy);
}

std::string get_as(const std::string &host, const std::string &path = "/pid") {
  return "GET " + path + " HTTP/1.1\r\nHost: " + host + "\r\n\r\n";
}

// Lets time pass that the proxy is to spend in a certain way.
void pass(Milliseconds time) {
  wait_for([] { return false; }, time);
}

warmproxy::Options any_port_target(Strings args) {
  auto options = fake_target(std::move(args));
  options.target_port = warmproxy::any_port;
  return options;
}

Strings asked(const ScriptedTarget &target) {
  Strings lines;
  for (const auto &request : target.requests()) {
    lines.push_back(request.head.substr(0, request.head.find(" HTTP/")));
  }
  return lines;
}

// Listens on 127.0.0.1 with room for one connection, which is taken, and never
// accepts: whoever connects now meets a full backlog.
class FullBacklog {
public:
  FullBacklog() : listener_(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof(address);
    auto *raw = reinterpret_cast<sockaddr *>(&address);
    if (listener_.fd() < 0 || bind(listener_.fd(), raw, size) != 0 ||
        listen(listener_.fd(), 0) != 0 ||
        getsockname(listener_.fd(), raw, &size) != 0) {
      fail("a listening socket");
    }
    port_ = ntohs(address.sin_port);
    client_ = std::make_unique<Socket>(connect_to("127.0.0.1", port_));
  }
  int port() const { return port_; }

private:
  Socket listener_;
  std::unique_ptr<Socket> client_;
  int port_ = 0;
};

} // namespace

// ---- the answer ------------------------------------------------------------

TEST_CASE("readiness: any status but 502, 503 and 504 means ready") {
  for (const char *status : {"204", "302", "400", "404", "421", "500", "501"}) {
    CAPTURE(status);
    RunningProxy proxy(fake_target({"--root-status", status}));
    CHECK(is_served(proxy, get(proxy.port(), "/pid")));
    CHECK(proxy.status().starts == 1);
  }
}

TEST_CASE("readiness: 502, 503 and 504 mean not yet") {
  for (const int status : {502, 503, 504}) {
    CAPTURE(status);
    std::atomic<int> count{0};
    ScriptedTarget target(
        answering_with([&](const std::string &head, const std::string &) {
          return has(head, "GET / ") && ++count < 3
                     ? "HTTP/1.1 " + std::to_string(status) +
                           " No\r\nContent-Length: 0\r\n\r\n"
                     : ok("served");
        }));
    auto options = attached(target);
    options.health_path = "/";
    RunningProxy proxy(options);
    CHECK(get(proxy.port(), "/page").body == "served");
    CHECK(count == 3);
  }
}

TEST_CASE("readiness: 503 until the end of the startup timeout") {
  auto options = fake_target();
  options.startup_timeout = Milliseconds(300);
  SUBCASE("is used as it is with the default health path") {
    options.args = {"--root-status", "503"};
    RunningProxy proxy(options);
    CHECK(is_served(proxy, get(proxy.port(), "/pid")));
    CHECK(get(proxy.port(), "/").status == 503);
    CHECK(proxy.status().starts == 1);
    CHECK(proxy.logged("target used as it is: GET / answered 503"));
  }
  SUBCASE("is used as it is if it takes longer than a second") {
    options.args = {"--root-status", "503", "--root-delay", "1200"};
    options.startup_timeout = Milliseconds(3000);
    RunningProxy proxy(options);
    CHECK(is_served(proxy, get(proxy.port(), "/pid")));
  }
  SUBCASE("is used as it is if other Hosts get no answer") {
    options.args = {"--root-status", "503", "--only-host", "good.example"};
    // Which Host the last probe names depends on the time.
    for (const int ms : {300, 350, 400}) {
      options.startup_timeout = Milliseconds(ms);
      RunningProxy proxy(options);
      RawClient good(proxy.port()), bad(proxy.port());
      good.send(get_as("good.example"));
      bad.send(get_as("bad.example"));
      CHECK(is_served(proxy, good.read_response()));
      CHECK(bad.read_response().status == 502);
    }
  }
  // A server of one connection at a time serves nobody else before.
  SUBCASE("is used as it is, and an open attempt is given up") {
    std::mutex busy;
    std::atomic<int> attempts{0};
    ScriptedTarget target([&](TargetConnection &c) {
      const std::lock_guard<std::mutex> lock(busy);
      const auto head = c.read_head();
      if (!has(head, "GET / ")) {
        c.send(ok("served"));
      } else if (++attempts == 1) {
        c.send("HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n");
      } else {
        c.read_to_end();
      }
    });
    options.target_port = target.port();
    RunningProxy proxy(options);
    CHECK(get(proxy.port(), "/page").body == "served");
  }
  SUBCASE("is a failed start if connections are refused meanwhile") {
    options.args = {"--root-status", "503"};
    options.startup_timeout = Milliseconds(3000);
    options.prewarm = true;
    RunningProxy proxy(options);
    CHECK(wait_for([&] {
      const auto port = proxy.status().port;
      return port > 0 && listening(port);
    }));
    // Besides this connection, two: the second probe follows the first 503.
    RawClient direct(proxy.status().port);
    CHECK(wait_for(
        [&] { return std::stoi(direct.get("/connections").body) > 2; }));
    CHECK(direct.get("/stop-listening").status == 200);
    const auto response = get(proxy.port(), "/pid");
    CHECK(response.status == 504);
    CHECK(has(response.body, "last probe: connection refused"));
  }
  SUBCASE("is a failed start with any other one") {
    options.args = {"--ready-after", "600000"};
    options.health_path = "/pid";
    RunningProxy proxy(options);
    const auto response = get(proxy.port(), "/pid");
    CHECK(response.status == 504);
    CHECK(has(response.body, "last probe: GET /pid answered 503"));
  }
  SUBCASE("is used as it is where it was there before") {
    ScriptedTarget target(
        answering("HTTP/1.1 503 Closed\r\nContent-Length: 0\r\n\r\n"));
    options.target_port = target.port();
    RunningProxy proxy(options);
    const auto response = get(proxy.port(), "/page");
    CHECK(response.status == 503);
    CHECK(response.body == "");
  }
}

TEST_CASE("readiness: interim responses and malformed ones are no answer") {
  std::atomic<int> count{0};
  ScriptedTarget target(
      answering_with([&](const std::string &head, const std::string &) {
        if (!has(head, "GET / ")) { return ok(); }
        switch (++count) {
        case 1: return std::string("SSH-2.0-OpenSSH_9.2\r\n\r\n");
        case 2:
          return std::string("HTTP/1.1 103 Early Hints\r\n\r\n"
                             "HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n");
        default: return "HTTP/1.1 100 Continue\r\n\r\n" + ok("served");
        }
      }));
  auto options = attached(target);
  options.health_path = "/";
  RunningProxy proxy(options);
  CHECK(get(proxy.port(), "/page").status == 200);
  CHECK(count == 3);
}

TEST_CASE("readiness: redirects on the same server are followed") {
  std::string location;
  bool followed = true;
  SUBCASE("a path") { location = "/login?a=b#c"; }
  SUBCASE("the Host that was sent") { location = "http://test/login?a=b"; }
  SUBCASE("the Host in another case") { location = "http://TEST/login?a=b"; }
  SUBCASE("another server") {
    location = "http://elsewhere/login";
    followed = false;
  }
  SUBCASE("a longer host") {
    location = "http://test.elsewhere/login";
    followed = false;
  }
  SUBCASE("without a scheme") {
    location = "//test/login";
    followed = false;
  }
  SUBCASE("TLS") {
    location = "https://test/login";
    followed = false;
  }
  SUBCASE("none") { followed = false; }
  ScriptedTarget target(
      answering_with([&](const std::string &head, const std::string &) {
        return has(head, "GET / ")
                   ? "HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: " +
                         location + "\r\n\r\n"
                   : ok();
      }));
  auto options = attached(target);
  options.health_path = "/";
  RunningProxy proxy(options);
  CHECK(get(proxy.port(), "/page").status == 200);
  Strings expected = {"GET /", "GET /page"};
  if (followed) { expected.insert(expected.begin() + 1, "GET /login?a=b"); }
  CHECK(asked(target) == expected);
}

TEST_CASE("readiness: an endless redirect counts as an answer") {
  ScriptedTarget target(
      answering("HTTP/1.1 307 On\r\nContent-Length: 0\r\nLocation: /\r\n\r\n"));
  auto options = attached(target);
  options.health_path = "/";
  RunningProxy proxy(options);
  CHECK(get(proxy.port(), "/page").status == 307);
  CHECK(target.requests().size() < 10);
}

TEST_CASE("readiness: the probe's connection serves no request") {
  for (const char *path : {"", "/"}) {
    CAPTURE(path);
    auto options = fake_target();
    options.health_path = path;
    RunningProxy proxy(options);
    RawClient client(proxy.port());
    CHECK(client.get("/connections").body == "2\n");
    CHECK(client.get("/connections").body == "2\n");
  }
}

TEST_CASE("readiness: a large first page is read to its end") {
  std::atomic<bool> sent{false};
  ScriptedTarget target([&](TargetConnection &c) {
    const auto head = c.read_head();
    if (has(head, "GET / ")) {
      sent = c.send(ok(std::string(8 << 20, 'x')));
      CHECK(c.read_head() == ""); // closed behind the response
    } else if (!head.empty()) {
      c.send(ok());
    }
  });
  auto options = attached(target);
  options.health_path = "/";
  RunningProxy proxy(options);
  CHECK(get(proxy.port(), "/page").status == 200);
  CHECK(wait_for([&] { return sent.load(); }));
  CHECK(wait_for([&] { return target.open() == 0 || target.open() == 1; }));
}

TEST_CASE("readiness: a server that was there before ends before it is ready") {
  auto options = fake_target();
  options.target_port = free_port();
  const auto port = std::to_string(options.target_port);
  Process found(built("fake"), {"--port", port, "--ready-after", "600000"});
  REQUIRE(wait_for([&] { return listening(options.target_port); }));
  RunningProxy proxy(options);
  RawClient client(proxy.port());
  client.send(get_as("test"));
  CHECK(proxy.logged("is served already"));
  found.signal(SIGKILL);
  CHECK(is_served(proxy, client.read_response()));
}

// ---- one attempt at a time -------------------------------------------------

TEST_CASE("readiness: a slow first page of a server with one thread") {
  RunningProxy proxy(fake_target({"--one-at-a-time", "--root-delay", "2500"}));
  const auto began = Clock::now();
  CHECK(get(proxy.port(), "/connections").body == "2\n");
  CHECK(Clock::now() - began < Milliseconds(10000));
}

TEST_CASE("readiness: an attempt is not given up while the target lives") {
  ScriptedTarget target([](TargetConnection &c) {
    for (auto head = c.read_head(); !head.empty(); head = c.read_head()) {
      if (has(head, "GET / ")) { pass(Milliseconds(2500)); }
      c.send(ok());
    }
  });
  auto options = attached(target);
  options.health_path = "/";
  RunningProxy proxy(options);
  CHECK(get(proxy.port(), "/page").status == 200);
  CHECK(asked(target) == Strings{"GET /", "GET /page"});
}

TEST_CASE("readiness: a second attempt after one that stays unanswered") {
  if (!in_full) { return; } // WARMPROXY_PROBE_PATIENCE is 15 s
  std::atomic<int> count{0};
  ScriptedTarget target([&](TargetConnection &c) {
    for (auto head = c.read_head(); !head.empty(); head = c.read_head()) {
      if (++count != 1) { c.send(ok()); }
    }
  });
  auto options = attached(target);
  options.health_path = "/";
  RunningProxy proxy(options);
  CHECK(get(proxy.port(), "/page", "", Milliseconds(40000)).status == 200);
  CHECK(count == 3);
}

TEST_CASE("readiness: the Host of the probe takes turns") {
  SUBCASE("that of the request that woke the target") {
    RunningProxy proxy(fake_target({"--only-host", "good.example"}));
    CHECK(is_served(proxy, exchange(proxy.port(), get_as("good.example"))));
  }
  SUBCASE("that of the latest request that waits") {
    RunningProxy proxy(fake_target({"--only-host", "good.example"}));
    RawClient bad(proxy.port()), good(proxy.port());
    bad.send(get_as("bad.example"));
    REQUIRE(wait_for([&] { return proxy.status().state == "starting"; }));
    good.send(get_as("good.example"));
    CHECK(is_served(proxy, good.read_response()));
    CHECK(bad.read_response().status == 502);
  }
  SUBCASE("localhost") {
    RunningProxy proxy(fake_target({"--only-host", "localhost"}));
    CHECK(exchange(proxy.port(), get_as("bad.example")).status == 502);
    CHECK(proxy.status().state == "up");
    CHECK(is_served(proxy, exchange(proxy.port(), get_as("localhost"))));
  }
  SUBCASE("localhost alone, without a request") {
    auto options = fake_target({"--only-host", "localhost"});
    options.prewarm = true;
    RunningProxy proxy(options);
    CHECK(wait_for([&] { return proxy.status().state == "up"; }));
  }
  SUBCASE("no turn of theirs is skipped") {
    std::mutex mutex;
    std::set<std::string> hosts;
    ScriptedTarget target(
        answering_with([&](const std::string &head, const std::string &) {
          const std::lock_guard<std::mutex> lock(mutex);
          hosts.insert(header_of(head, "Host"));
          return hosts.size() < 3 ? std::string("HTTP/1.1 503 No\r\n"
                                                "Content-Length: 0\r\n\r\n")
                                  : ok();
        }));
    auto options = attached(target);
    options.health_path = "/";
    RunningProxy proxy(options);
    RawClient first(proxy.port()), second(proxy.port());
    first.send(get_as("first.example", "/page"));
    REQUIRE(wait_for([&] { return !target.requests().empty(); }));
    second.send(get_as("second.example", "/page"));
    CHECK(first.read_response().status == 200);
    CHECK(second.read_response().status == 200);
    CHECK(hosts == std::set<std::string>{"first.example", "second.example",
                                         "localhost"});
  }
}

// ---- connecting ------------------------------------------------------------

TEST_CASE("readiness: a target that never accepts") {
  auto options = fake_target({"--never-accept", "--backlog", "0"});
  SUBCASE("is given up at the end of the startup timeout") {
    options.startup_timeout = Milliseconds(1000);
    RunningProxy proxy(options);
    const auto began = Clock::now();
    const auto response = get(proxy.port());
    CHECK(response.status == 504);
    CHECK(has(response.body, "no answer to GET /"));
    CHECK(Clock::now() - began < Milliseconds(6000));
  }
  SUBCASE("does not hold up a stop") {
    RunningProxy proxy(options);
    RawClient client(proxy.port());
    client.send(get_as("test"));
    CHECK(proxy.logged("target started"));
    const auto began = Clock::now();
    proxy.proxy().stop();
    const auto response = client.read_response();
    CHECK(response.status == 503);
    CHECK(has(response.body, "shutting down"));
    CHECK(proxy.stop());
    CHECK(Clock::now() - began < Milliseconds(6000));
  }
}

TEST_CASE("readiness: a backlog that is full") {
  const FullBacklog full;
  auto options = fake_target();
  options.target_port = full.port();
  SUBCASE("ends with the startup timeout") {
    options.startup_timeout = Milliseconds(1000);
    RunningProxy proxy(options);
    const auto began = Clock::now();
    const auto response = get(proxy.port());
    CHECK(response.status == 504);
    CHECK(has(response.body, "last probe: its backlog is full"));
    CHECK(Clock::now() - began < Milliseconds(6000));
  }
  SUBCASE("does not hold up a stop") {
    RunningProxy proxy(options);
    RawClient client(proxy.port());
    client.send(get_as("test"));
    CHECK(proxy.logged("is served already"));
    const auto began = Clock::now();
    CHECK(proxy.stop());
    CHECK(client.read_response().status == 503);
    CHECK(Clock::now() - began < Milliseconds(6000));
  }
}

TEST_CASE("readiness: a target that exits while it is asked") {
  RunningProxy proxy(
      fake_target({"--never-answer", "--exit-after", "200", "4"}));
  const auto began = Clock::now();
  const auto response = get(proxy.port());
  CHECK(response.status == 502);
  CHECK(has(response.body, "exited with status 4"));
  CHECK(Clock::now() - began < Milliseconds(6000));
}

TEST_CASE("readiness: the 504 names the last probe and the setting") {
  auto options = fake_target({"--never-listen"});
  options.startup_timeout = Milliseconds(300);
  RunningProxy proxy(options);
  const auto response = get(proxy.port());
  CHECK(response.status == 504);
  CHECK(response.body ==
        "warmproxy: target not ready after 0.3 s (last probe: connection "
        "refused); see WARMPROXY_STARTUP_TIMEOUT\n");
}

TEST_CASE("readiness: an answer on its way at the deadline is waited for") {
  ScriptedTarget target([](TargetConnection &c) {
    for (auto head = c.read_head(); !head.empty(); head = c.read_head()) {
      if (head.find("GET / ") == 0) { poll(nullptr, 0, 300); }
      c.send(ok());
    }
  });
  auto options = attached(target);
  options.health_path = "/";
  options.startup_timeout = Milliseconds(200); // and a second
  RunningProxy proxy(options);
  CHECK(get(proxy.port(), "/page").status == 200);
}

// ---- giving up a target that was up ----------------------------------------

TEST_CASE("readiness: a full backlog is no evidence of death") {
  auto options =
      fake_target({"--one-at-a-time", "--backlog", "1", "--root-delay", "1"});
  options.startup_timeout = Milliseconds(500);
  RunningProxy proxy(options);
  REQUIRE(get(proxy.port(), "/pid").status == 200);
  const auto pid = pid_line(proxy);
  RawClient slow(proxy.port());
  slow.send(get_as("test", "/slow?ms=3000"));
  std::list<RawClient> others;
  for (int i = 0; i < 5; ++i) {
    others.emplace_back(proxy.port());
    others.back().send(get_as("test"));
  }
  CHECK(slow.read_response().body == "slow\n");
  for (auto &client : others) {
    CHECK(client.read_response().body == pid);
  }
  CHECK(proxy.status().starts == 1);
}

TEST_CASE("readiness: a target that refuses connections") {
  auto options = fake_target();
  options.startup_timeout = Milliseconds(500);
  RunningProxy proxy(options);
  REQUIRE(get(proxy.port(), "/pid").status == 200);
  const auto pid = pid_line(proxy);
  RawClient slow(proxy.port());
  const auto stop_listening = [&] {
    // With a body, so that nobody else gets the upstream connection.
    RawClient client(proxy.port());
    CHECK(client.post("/stop-listening", "body").status == 200);
  };
  SUBCASE("is replaced") {
    stop_listening();
    CHECK(wait_for([&] {
      const auto response = get(proxy.port(), "/pid");
      return response.status == 200 && response.body != pid;
    }));
    CHECK(proxy.status().starts == 2);
    CHECK(proxy.logged("target has refused connections for 0.5 s"));
  }
  SUBCASE("is left running in the middle of a response") {
    slow.send(get_as("test", "/slow?ms=3000"));
    REQUIRE(wait_for([&] { return proxy.status().in_flight == 1; }));
    stop_listening();
    // Some use idle connections until one is refused.
    CHECK(wait_for([&] { return get(proxy.port(), "/pid").status == 504; }));
    CHECK(proxy.status().pid == std::stol(pid));
    CHECK(slow.read_response().body == "slow\n");
    slow.close();
    CHECK(wait_for([&] {
      const auto response = get(proxy.port(), "/pid");
      return response.status == 200 && response.body != pid;
    }));
  }
}

// ---- where the program listens ---------------------------------------------

TEST_CASE("readiness: a program that listens elsewhere is found out" *
          doctest::skip(!on_linux)) {
  struct Case {
    Strings args;
    Strings said;
  };
  const auto port = std::to_string(free_port());
  const std::vector<Case> cases = {
      {{"--port", port},
       {"fake listens on port " + port + ", not on ",
        ": set WARMPROXY_TARGET_PORT=" + port + " or make it listen on $PORT"}},
      {{"--port", port, "--also-listen", "0", "600000"},
       {"fake listens on port ", " and port ",
        ": set WARMPROXY_TARGET_PORT to the right one"}},
      {{"--host", "127.0.0.2"},
       {"fake listens on 127.0.0.2:", ", not on 127.0.0.1:",
        ": make it listen on 127.0.0.1:"}},
  };
  for (const auto &c : cases) {
    for (const bool fixed : {false, true}) {
      CAPTURE(c.said.front());
      CAPTURE(fixed);
      auto options = fake_target(c.args);
      if (fixed) { options.target_port = free_port(); }
      options.startup_timeout = Milliseconds(1500);
      RunningProxy proxy(options);
      const auto response = get(proxy.port(), "/pid");
      CHECK(response.status == 504);
      CHECK(has(response.body, "last probe: connection refused"));
      for (const auto &text : c.said) {
        CHECK(has(response.body, text));
        CHECK(proxy.logged(text));
      }
      // Once on its own, and once with the failure.
      int lines = 0;
      for (const auto &line : proxy.log_lines()) {
        lines += has(line, c.said.front());
      }
      CHECK(lines == 2);
    }
  }
}

TEST_CASE("readiness: a program that listens where it should is not reported") {
  RunningProxy proxy(
      fake_target({"--ready-after", "1500", "--also-listen", "0", "600000"}));
  CHECK(get(proxy.port(), "/pid").status == 200);
  for (const auto &line : proxy.log_lines()) {
    CHECK_FALSE(has(line, "listens on"));
  }
}

TEST_CASE("readiness: any_port uses the program's single port" *
          doctest::skip(!on_linux)) {
  auto options = any_port_target({"--port", "0"});
  SUBCASE("of its own choice") {}
  SUBCASE("that it was given") {
    options.args = {"--port", std::to_string(free_port())};
  }
  SUBCASE("offered as $PORT") { options.args = {}; }
  SUBCASE("on ::1") { options.args = {"--host", "::1", "--port", "0"}; }
  SUBCASE("on all addresses") {
    options.args = {"--host", "::", "--port", "0"};
  }
  SUBCASE("late, and not ready at once") {
    options.args = {"--port",        "0",   "--listen-after", "1200",
                    "--ready-after", "1200"};
  }
  SUBCASE("within the last second of the startup timeout") {
    options.args = {"--port", "0", "--listen-after", "200"};
    options.startup_timeout = Milliseconds(1100);
  }
  SUBCASE("of its child") { options.args.push_back("--launcher"); }
  SUBCASE("of a shell's child") {
    options.binary = "/bin/sh";
    options.args = {"-c", "\"$0\" --port 0; exit 3", built("fake")};
  }
  SUBCASE("after a second one has closed") {
    options.args = {"--port", "0", "--also-listen", "300", "800"};
  }
  RunningProxy proxy(options);
  CHECK(proxy.status().port == 0);
  CHECK(get(proxy.port(), "/pid").status == 200);
  const auto port = proxy.status().port;
  CHECK(port > 0);
  const bool ipv6_only =
      options.args == Strings{"--host", "::1", "--port", "0"};
  CHECK((ipv6_only || get(port, "/pid").status == 200));
}

// Several ports are never chosen from, and a second one may still open.
TEST_CASE("readiness: any_port that has not settled is not used as it is" *
          doctest::skip(!on_linux)) {
  auto options = any_port_target({"--port", "0", "--root-status", "503"});
  options.startup_timeout = Milliseconds(500);
  RunningProxy proxy(options);
  CHECK(get(proxy.port(), "/pid").status == 504);
}

TEST_CASE("readiness: any_port is looked for anew at each start" *
          doctest::skip(!on_linux)) {
  RunningProxy proxy(any_port_target({"--port", "0"}));
  REQUIRE(get(proxy.port(), "/pid").status == 200);
  const auto before = proxy.status();
  kill(static_cast<pid_t>(before.pid), SIGKILL);
  CHECK(wait_for([&] { return get(proxy.port(), "/pid").status == 200; }));
  const auto after = proxy.status();
  CHECK(after.pid != before.pid);
  CHECK(after.starts == 2);
  CHECK(after.port != before.port);
}

// Nobody outside the process group may get its requests.
TEST_CASE("readiness: any_port follows a program that restarts itself" *
          doctest::skip(!on_linux)) {
  auto options = any_port_target({});
  options.binary = "/bin/sh";
  options.args = {"-c", "while :; do \"$0\" --port 0; done", built("fake")};
  RunningProxy proxy(options);
  RawClient client(proxy.port());
  const auto first = client.get("/pid").body;
  const auto before = proxy.status();
  kill(std::stoi(first), SIGKILL);
  SUBCASE("when a request finds the old port closed") {
    const auto response = client.get("/pid");
    CHECK(response.status == 200);
    CHECK(response.body != first);
  }
  SUBCASE("without a request") {
    CHECK(wait_for([&] { return proxy.status().port != before.port; }));
    CHECK(wait_for([&] { return proxy.status().state == "up"; }));
    CHECK(client.get("/pid").status == 200);
  }
  const auto after = proxy.status();
  CHECK(after.pid == before.pid);
  CHECK(after.port != before.port);
  CHECK(after.starts == 2);
  CHECK(
      proxy.logged("target now listens on port " + std::to_string(after.port)));
}

TEST_CASE("readiness: any_port takes none of several" *
          doctest::skip(!on_linux)) {
  auto options = any_port_target({"--port", "0"});
  options.startup_timeout = Milliseconds(2500);
  SUBCASE("of one process") {
    options.args.insert(options.args.end(), {"--also-listen", "0", "600000"});
  }
  SUBCASE("of which the second opens a little later") {
    options.args.insert(options.args.end(), {"--also-listen", "500", "600000"});
  }
  SUBCASE("of two processes") {
    options.binary = "/bin/sh";
    options.args = {"-c", "\"$0\" --port 0 & \"$0\" --port 0; exit 3",
                    built("fake")};
  }
  RunningProxy proxy(options);
  const auto response = get(proxy.port(), "/pid");
  CHECK(response.status == 504);
  CHECK(has(response.body, "fake listens on port "));
  CHECK(has(response.body, " and port "));
  CHECK(has(response.body, "set WARMPROXY_TARGET_PORT to the right one"));
}

TEST_CASE("readiness: any_port with another address only" *
          doctest::skip(!on_linux)) {
  auto options = any_port_target({"--host", "127.0.0.2", "--port", "0"});
  options.startup_timeout = Milliseconds(1500);
  RunningProxy proxy(options);
  const auto response = get(proxy.port(), "/pid");
  CHECK(response.status == 504);
  CHECK(has(response.body, "fake listens on 127.0.0.2:"));
  CHECK(has(response.body, ": make it listen on 127.0.0.1"));
}

TEST_CASE("readiness: any_port connects to nobody else") {
  ScriptedTarget stranger(answering(ok("a stranger")));
  warmproxy::Options options;
  options.binary = "/bin/sh";
  options.args = {"-c", "sleep 600; :"};
  options.target_port = warmproxy::any_port;
  options.startup_timeout = Milliseconds(1000);
  RunningProxy proxy(options);
  const auto response = get(proxy.port());
  CHECK(response.status == 504);
  CHECK(has(response.body, "last probe: no single listening port found"));
  CHECK(stranger.accepted() == 0);
}

// ---- time ------------------------------------------------------------------

TEST_CASE("time: a start is only timed while we run") {
  auto environment = serve_fake({"--listen-after", "1200"});
  environment["WARMPROXY_STARTUP_TIMEOUT"] = "3s";
  SUBCASE("with a target that answers soon") {}
  SUBCASE("with one that has answered meanwhile") {
    environment = serve_fake({"--root-delay", "1200"});
    environment["WARMPROXY_STARTUP_TIMEOUT"] = "3s";
  }
  ServeProcess proxy(environment);
  RawClient client(proxy.port());
  client.send(get_as("test"));
  CHECK(proxy.printed("target started"));
  proxy.signal(SIGSTOP);
  pass(Milliseconds(5000));
  proxy.signal(SIGCONT);
  CHECK(client.read_response().status == 200);
  CHECK_FALSE(has(proxy.err(), "not ready"));
}

TEST_CASE("time: what has arrived is handled before an idle timeout") {
  auto environment = serve_fake();
  environment["WARMPROXY_KEEP_ALIVE_TIMEOUT"] = "1s";
  ServeProcess proxy(environment);
  RawClient client(proxy.port());
  REQUIRE(client.get("/pid").status == 200);
  proxy.signal(SIGSTOP);
  client.send(get_as("test"));
  pass(Milliseconds(3000));
  proxy.signal(SIGCONT);
  CHECK(client.read_response().status == 200);
}

TEST_CASE("time: an idle target is only timed while we run") {
  auto environment = serve_fake();
  environment["WARMPROXY_IDLE_STOP"] = "4s";
  ServeProcess proxy(environment);
  const auto first = get(proxy.port(), "/pid");
  REQUIRE(first.status == 200);
  proxy.signal(SIGSTOP);
  pass(Milliseconds(5000));
  proxy.signal(SIGCONT);
  CHECK(get(proxy.port(), "/pid").body == first.body);
  CHECK(proxy.printed("target stopped: idle for 4 s"));
}

// The pause after an answer must not cover the deadline.
TEST_CASE(
    "readiness: a target that is not being asked at the deadline is asked "
    "once more") {
  using namespace warmproxy::detail;
  Probe probe({{false, support::free_port()}});
  probe.ask("/", "localhost", RunningClock::now());
  REQUIRE(probe.latest().state() == Probe::State::no_connection);
  const auto next = probe.ask_at(Time::max());
  const auto deadline = next - std::chrono::microseconds(1);
  CHECK(probe.ask_at(next + seconds(1)) == next);
  CHECK(probe.ask_at(deadline) == deadline);
  probe.ask("/", "localhost", deadline);
  CHECK(probe.ask_at(deadline) > deadline);
}

TEST_CASE("time: milliseconds::max() means never") {
  const auto never = Milliseconds::max();
  auto options = fake_target({"--listen-after", "300"});
  options.startup_timeout = options.stop_timeout = options.idle_stop = never;
  options.waiting_page_after = options.keep_alive_timeout = never;
  options.background_work = never;
  RunningProxy proxy(options);
  const auto response =
      get(proxy.port(), "/pid",
          "Sec-Fetch-Dest: document\r\nAccept: text/html\r\n");
  CHECK(is_served(proxy, response));
  CHECK_FALSE(wait_for([&] { return proxy.status().state != "up"; },
                       Milliseconds(300)));
  kill(static_cast<pid_t>(proxy.status().pid), SIGKILL);
  CHECK(wait_for([&] { return get(proxy.port(), "/pid").status == 200; }));
  CHECK(proxy.stop());
}
