// How the target is started, and found ready.

#include "figures.hpp"

using namespace support;

namespace {

std::string line_of(pid_t pid) { return std::to_string(pid) + "\n"; }

std::string body_of(int port, const std::string &target) {
  const auto response = get(port, target);
  CHECK(response.status == 200);
  return response.body;
}

} // namespace

TEST_CASE("start: the first request starts the target, later ones find it up") {
  RunningProxy proxy(fake_target());
  CHECK(proxy.status().state == "cold");
  CHECK(proxy.status().pid == 0);
  CHECK(proxy.status().starts == 0);

  RawClient client(proxy.port());
  const auto first = client.get("/pid");
  CHECK(first.status == 200);
  CHECK(first.header("Server-Timing").find("warmproxy;desc=\"cold start\"") ==
        0);
  const auto next = client.get("/pid");
  CHECK(next.status == 200);
  CHECK(next.body == first.body);
  CHECK(next.count("Server-Timing") == 0);

  const auto status = proxy.status();
  CHECK(status.state == "up");
  CHECK(line_of(static_cast<pid_t>(status.pid)) == first.body);
  CHECK(status.starts == 1);
  CHECK(status.last_exit == "");
  CHECK(status.requests == 2);
  CHECK(status.connections == 1);
  CHECK(wait_for([&] { return proxy.status().in_flight == 0; }));
}

TEST_CASE("start: 200 simultaneous first requests cause one start") {
  TemporaryDirectory directory;
  const auto starts = directory / "starts";
  RunningProxy proxy(
      fake_target({"--listen-after", "1000", "--count-file", starts}));
  std::list<RawClient> clients;
  for (int i = 0; i < 200; ++i) {
    clients.emplace_back(proxy.port());
    clients.back().send("GET /pid?" + std::to_string(i) +
                        " HTTP/1.1\r\nHost: test\r\n\r\n");
  }
  for (auto &client : clients) {
    const auto response = client.read_response();
    CHECK(response.status == 200);
    CHECK(response.body == read_file(starts));
    CHECK(response.count("Server-Timing") == 1);
  }
  CHECK(proxy.status().starts == 1);
}

TEST_CASE("readiness: 503 until ready") {
  const std::vector<std::string> slow = {"--ready-after", "400"};
  SUBCASE("is not up while its health path responds 503") {
    RunningProxy proxy(fake_target(slow));
    CHECK(get(proxy.port(), "/pid").status == 200);
  }
  SUBCASE("is up at once without a health path") {
    auto options = fake_target(slow);
    options.health_path = "";
    RunningProxy proxy(options);
    CHECK(get(proxy.port(), "/pid").status == 503);
  }
  SUBCASE("is up with any other status") {
    auto options = fake_target(slow);
    options.health_path = "/not-there";
    RunningProxy proxy(options);
    CHECK(get(proxy.port(), "/pid").status == 200);
  }
}

TEST_CASE("readiness: the probe's connection serves no request") {
  auto options = fake_target();
  SUBCASE("a connect") { options.health_path = ""; }
  SUBCASE("a request") { options.health_path = "/pid"; }
  RunningProxy proxy(options);
  RawClient client(proxy.port());
  CHECK(client.get("/connections").body == "2\n");
  CHECK(client.get("/connections").body == "2\n");
}

TEST_CASE(
    "readiness: only the health path is probed, and only until it responds") {
  ScriptedTarget target(answering(ok()));
  auto options = attached(target);
  std::vector<std::string> expected = {"GET /first", "POST /second"};
  SUBCASE("none") {}
  SUBCASE("one") {
    options.health_path = "/health?x=%20";
    expected.insert(expected.begin(), "GET /health?x=%20");
  }
  RunningProxy proxy(options);
  RawClient client(proxy.port());
  CHECK(client.get("/first").status == 200);
  CHECK(client.post("/second", "body").status == 200);
  std::vector<std::string> asked;
  for (const auto &request : target.requests()) {
    asked.push_back(request.head.substr(0, request.head.find(" HTTP/")));
  }
  CHECK(asked == expected);
}

TEST_CASE("readiness: a target that responds 503 for long is waited for") {
  auto options = fake_target({"--ready-after", in_full ? "10000" : "1000"});
  RunningProxy proxy(options);
  const auto response = get(proxy.port(), "/pid");
  CHECK(response.status == 200);
  CHECK(response.count("Server-Timing") == 1);
}

TEST_CASE("start: the target learns its port") {
  auto options = fake_target({"--args-follow", "{port}", "-p={port}", "{port"});
  options.env["LISTEN"] = "127.0.0.1:{port}";
  SUBCASE("a free one") {}
  SUBCASE("the one that is set") { options.target_port = free_port(); }
  RunningProxy proxy(options);
  const auto args = body_of(proxy.port(), "/args");
  const auto port = std::to_string(proxy.status().port);
  if (options.target_port != 0) {
    CHECK(port == std::to_string(options.target_port));
  }
  CHECK(args == "--args-follow\n" + port + "\n-p=" + port + "\n{port\n");
  const auto environment = "\n" + body_of(proxy.port(), "/env");
  CHECK(environment.find("\nPORT=" + port + "\n") != std::string::npos);
  CHECK(environment.find("\nLISTEN=127.0.0.1:" + port + "\n") !=
        std::string::npos);
}

TEST_CASE("start: a free port is picked for every start") {
  RunningProxy proxy(fake_target());
  CHECK(get(proxy.port(), "/pid").status == 200);
  const auto before = proxy.status();
  kill_one(before.pid);
  CHECK(wait_for([&] { return proxy.status().state == "cold"; }));
  // Somebody else takes it.
  Process other(built("fake"), {"--port", std::to_string(before.port)});
  CHECK(wait_for([&] { return listening(before.port); }));
  const auto body = body_of(proxy.port(), "/pid");
  const auto after = proxy.status();
  CHECK(body == line_of(static_cast<pid_t>(after.pid)));
  CHECK(after.port != before.port);
}

TEST_CASE("start: a target that listens on ::1") {
  RunningProxy proxy(fake_target({"--host", "::1"}));
  CHECK(get(proxy.port(), "/pid").status == 200);
}

TEST_CASE("start: the working directory") {
  TemporaryDirectory directory;
  auto options = fake_target();
  std::string expected = directory.path();
  SUBCASE("that is set") { options.directory = directory.path(); }
  SUBCASE("or ours") {
    char name[4096];
    expected = getcwd(name, sizeof(name));
  }
  RunningProxy proxy(options);
  CHECK(body_of(proxy.port(), "/cwd") == expected + "\n");
}

TEST_CASE("start: prewarm") {
  auto options = fake_target();
  options.prewarm = true;
  RunningProxy proxy(options);
  CHECK(wait_for([&] { return proxy.status().state == "up"; }));
  const auto response = get(proxy.port(), "/pid");
  CHECK(response.status == 200);
  CHECK(response.count("Server-Timing") == 0);
  CHECK(proxy.status().starts == 1);
}

TEST_CASE("start: a server that already listens on the fixed port is used") {
  TemporaryDirectory directory;
  const auto port = free_port();
  auto options = fake_target({"--count-file", directory / "starts"});
  options.target_port = port;

  Process found(built("fake"), {"--port", std::to_string(port)});
  REQUIRE(wait_for([&] { return listening(port); }));
  {
    RunningProxy proxy(options);
    CHECK(body_of(proxy.port(), "/pid") == line_of(found.pid()));
    CHECK(proxy.status().pid == 0);
    CHECK(proxy.status().port == port);
    CHECK(read_file(directory / "starts") == "");

    SUBCASE("and not stopped with the proxy") {}
    SUBCASE("and replaced by the target when it has ended") {
      found.signal(SIGKILL);
      found.wait();
      const auto response = get(proxy.port(), "/pid");
      CHECK(response.status == 200);
      CHECK(response.body == read_file(directory / "starts"));
      return;
    }
  }
  CHECK(found.running());
  CHECK(get(port).status == 200);
}

TEST_CASE("start: a target that logs much before it listens") {
  const long megabytes = in_full ? 100 : 10;
  ServeProcess proxy(serve_fake({"--log-mb", std::to_string(megabytes)}));
  CHECK(get(proxy.port(), "/pid").status == 200);
  struct stat log;
  REQUIRE(stat(proc_file(proxy.pid(), "fd/2").c_str(), &log) == 0);
  CHECK(log.st_size >= megabytes << 20);
}

TEST_CASE("start: Server-Timing is added to responses that waited") {
  ScriptedTarget target(answering(ok("ok", "Server-Timing: db;dur=1\r\n")));
  RunningProxy proxy(attached(target));
  RawClient client(proxy.port());
  const auto cold = client.get();
  CHECK(cold.header("Server-Timing") == "db;dur=1");
  CHECK(cold.count("Server-Timing") == 2);
  CHECK(cold.headers.back().second.find("warmproxy;desc=\"cold start\";dur=") ==
        0);
  CHECK(client.get().head ==
        "HTTP/1.1 200 OK\r\nServer-Timing: db;dur=1\r\nContent-Length: "
        "2\r\n\r\n");
}
