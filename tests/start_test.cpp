// The target's life: started by the first request, found warm by the next,
// stopped when it had nothing to do.

#include "support.hpp"

#include <doctest/doctest.h>

using namespace support;

namespace {

std::string line_of(pid_t pid) { return std::to_string(pid) + "\n"; }

bool cold(const RunningProxy &proxy) { return proxy.status().state == "cold"; }

std::string body_of(int port, const std::string &target) {
  const auto response = get(port, target);
  CHECK(response.status == 200);
  return response.body;
}

} // namespace

TEST_CASE("the first request starts the target, the next find it warm") {
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

TEST_CASE("200 first requests at once make one start, and all are answered") {
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

TEST_CASE("a target that listens before it can serve") {
  const std::vector<std::string> slow = {"--ready-after", "400"};
  SUBCASE("is not up until its health path says so") {
    RunningProxy proxy(fake_target(slow));
    CHECK(get(proxy.port(), "/pid").status == 200);
  }
  SUBCASE("is up at once where there is no health path") {
    auto options = fake_target(slow);
    options.health_path = "";
    RunningProxy proxy(options);
    CHECK(get(proxy.port(), "/pid").status == 503);
  }
  SUBCASE("is up with any answer below 500") {
    auto options = fake_target(slow);
    options.health_path = "/not-there";
    RunningProxy proxy(options);
    CHECK(get(proxy.port(), "/pid").status == 200);
  }
}

TEST_CASE("the connection that proved the target up is the first one used") {
  auto options = fake_target();
  SUBCASE("by taking it") { options.health_path = ""; }
  SUBCASE("by an answer") { options.health_path = "/pid"; }
  RunningProxy proxy(options);
  RawClient client(proxy.port());
  CHECK(client.get("/connections").body == "1\n");
  CHECK(client.get("/connections").body == "1\n");
}

TEST_CASE("only the health path is asked, and only until it answers") {
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

TEST_CASE("the target is told its port") {
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

TEST_CASE("a target on IPv6 is found") {
  RunningProxy proxy(fake_target({"--host", "::1"}));
  CHECK(get(proxy.port(), "/pid").status == 200);
}

TEST_CASE("the target inherits the environment, less what is ours") {
  auto environment = serve_fake();
  environment["WARMPROXY_ENV_TEST"] = "1";
  environment["SOMETHING"] = "else";
  environment["EMPTY"] = "";
  ServeProcess serve(environment);
  const auto inherited = "\n" + body_of(serve.port(), "/env");
  CHECK(inherited.find("\nSOMETHING=else\n") != std::string::npos);
  CHECK(inherited.find("\nEMPTY=\n") != std::string::npos);
  CHECK(inherited.find("\nPATH=") != std::string::npos);
  CHECK(inherited.find("WARMPROXY_") == std::string::npos);
  // The port that we listen on is not the one that it shall listen on.
  CHECK(inherited.find("\nPORT=" + std::to_string(serve.port()) + "\n") ==
        std::string::npos);
}

TEST_CASE("env adds to the environment, and wins over it") {
  auto options = fake_target();
  options.env = {{"PATH", "/nowhere"}, {"ADDED", "a=b c"}};
  RunningProxy proxy(options);
  const auto environment = "\n" + body_of(proxy.port(), "/env");
  CHECK(environment.find("\nPATH=/nowhere\n") != std::string::npos);
  CHECK(environment.find("\nADDED=a=b c\n") != std::string::npos);
}

TEST_CASE("the target gets its signals back, and no descriptor of ours") {
  // What a careless caller might have left behind.
  sigset_t blocked, before;
  sigemptyset(&blocked);
  sigaddset(&blocked, SIGUSR1);
  pthread_sigmask(SIG_BLOCK, &blocked, &before);
  const auto ignored = signal(SIGUSR2, SIG_IGN);
  const int open = dup(0);
  {
    RunningProxy proxy(fake_target());
    CHECK(body_of(proxy.port(), "/signals") == "blocked:\nignored:\n");
    CHECK(body_of(proxy.port(), "/fds") == "0\n1\n2\n");
  }
  close(open);
  signal(SIGUSR2, ignored);
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

TEST_CASE("the target runs in its directory") {
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

TEST_CASE("prewarm starts the target without a request") {
  auto options = fake_target();
  options.prewarm = true;
  RunningProxy proxy(options);
  CHECK(wait_for([&] { return proxy.status().state == "up"; }));
  const auto response = get(proxy.port(), "/pid");
  CHECK(response.status == 200);
  CHECK(response.count("Server-Timing") == 0);
  CHECK(proxy.status().starts == 1);
}

TEST_CASE("an idle target is stopped, and started again when it is wanted") {
  auto options = fake_target({"--fork-worker"});
  options.idle_stop = Milliseconds(50);
  options.stop_timeout = Milliseconds(100);
  RunningProxy proxy(options);
  const auto pid = static_cast<pid_t>(std::stol(body_of(proxy.port(), "/pid")));
  CHECK(wait_for([&] { return cold(proxy); }));
  CHECK(children_in_group(pid).empty());
  CHECK(proxy.status().pid == 0);
  CHECK(proxy.status().last_exit != "");

  CHECK(body_of(proxy.port(), "/pid") != line_of(pid));
  CHECK(proxy.status().starts == 2);
}

TEST_CASE("a target that streams or tunnels is not idle") {
  TemporaryDirectory directory;
  auto options = fake_target();
  options.idle_stop = Milliseconds(50);
  RunningProxy proxy(options);
  RawClient client(proxy.port());

  std::function<void()> finish;
  SUBCASE("an event stream") {
    client.send("GET /sse?n=2&gate=" + (directory / "gate") +
                " HTTP/1.1\r\nHost: test\r\n\r\n");
    client.read_until("data: 1\n\n");
    finish = [&] {
      write_file(directory / "gate", "");
      client.read_until("data: 2\n\n");
    };
  }
  SUBCASE("a tunnel") {
    client.send("GET /ws HTTP/1.1\r\nHost: test\r\nConnection: Upgrade\r\n"
                "Upgrade: echo\r\n\r\n");
    CHECK(client.read_response().status == 101);
    finish = [&] {
      client.send("still there");
      CHECK(client.read_exact(11) == "still there");
      client.shutdown_write();
      CHECK(client.at_end());
    };
  }
  SUBCASE("an upload") {
    client.send("POST /upload HTTP/1.1\r\nHost: test\r\n"
                "Content-Length: 10\r\n\r\n");
    CHECK(wait_for([&] { return proxy.status().state == "up"; }));
    finish = [&] {
      client.send_generated(10);
      CHECK(client.read_response().body == "10\n");
    };
  }
  CHECK(!wait_for([&] { return proxy.status().state != "up"; },
                  Milliseconds(400)));
  CHECK(proxy.status().in_flight == 1);
  finish();
  CHECK(wait_for([&] { return cold(proxy); }));
  CHECK(proxy.status().starts == 1);
}

TEST_CASE("what already answers on the target's port is served from") {
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

    SUBCASE("and not stopped with us") {}
    SUBCASE("and replaced by the target once it has gone") {
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

TEST_CASE("a proxy that is stopped leaves nothing behind") {
  pid_t pid = 0;
  const auto started = [&](RunningProxy &proxy) {
    pid = static_cast<pid_t>(std::stol(body_of(proxy.port(), "/pid")));
    CHECK(!children_in_group(pid).empty());
  };
  SUBCASE("of a target that obeys") {
    RunningProxy proxy(fake_target());
    started(proxy);
    CHECK(proxy.stop());
  }
  SUBCASE("of one that takes its time") {
    RunningProxy proxy(fake_target({"--term-delay", "200"}));
    started(proxy);
    CHECK(proxy.stop());
  }
  SUBCASE("of one that leaves a worker behind") {
    auto options = fake_target({"--fork-worker"});
    options.stop_timeout = Milliseconds(100);
    RunningProxy proxy(options);
    started(proxy);
    proxy.stop();
  }
  SUBCASE("of one that does not listen to SIGTERM") {
    auto options = fake_target({"--ignore-term"});
    options.stop_timeout = Milliseconds(100);
    RunningProxy proxy(options);
    started(proxy);
    proxy.stop();
  }
  SUBCASE("of one that has not come up yet") {
    TemporaryDirectory directory;
    auto options =
        fake_target({"--never-listen", "--count-file", directory / "starts"});
    options.prewarm = true;
    RunningProxy proxy(options);
    REQUIRE(wait_for([&] { return read_file(directory / "starts") != ""; }));
    pid = static_cast<pid_t>(std::stol(read_file(directory / "starts")));
    proxy.stop();
  }
  SUBCASE("of none") {
    RunningProxy proxy(fake_target());
    CHECK(proxy.stop());
    return;
  }
  CHECK(children_in_group(pid).empty());
}

TEST_CASE("memory does not grow with a body") {
  ServeProcess serve(serve_fake());
  const auto port = serve.port();
  CHECK(get(port).status == 200);
  const auto before = peak_rss_kb(serve.pid());
  const auto size = large_body();
  const auto n = std::to_string(size);
  const auto start = [](const std::string &method, const std::string &target) {
    return method + " " + target + " HTTP/1.1\r\nHost: test\r\n";
  };
  RawClient client(port);

  SUBCASE("down, with its length") {
    client.send(start("GET", "/bytes?n=" + n) + "\r\n");
    CHECK(client.read_response_head().header("Content-Length") == n);
    CHECK(client.verify_generated(size) == size);
    CHECK(client.get("/pid").status == 200);
  }
  SUBCASE("down, until the connection's end") {
    client.send(start("GET", "/close?n=" + n) + "\r\n");
    CHECK(client.read_response_head().status == 200);
    CHECK(client.verify_generated(size) == size);
    CHECK(client.at_end());
  }
  SUBCASE("down, in chunks") {
    client.send(start("GET", "/chunked?n=" + n) + "\r\n");
    CHECK(client.read_response_head().status == 200);
    std::uint64_t at = 0;
    for (;;) {
      const auto chunk = std::stoul(client.read_until("\r\n"), nullptr, 16);
      const auto data = client.read_exact(chunk + 2);
      if (chunk == 0) { break; }
      REQUIRE(bytes::match(data.data(), chunk, at));
      at += chunk;
    }
    CHECK(at == size);
    CHECK(client.get("/pid").status == 200);
  }
  SUBCASE("up, with its length") {
    client.send(start("POST", "/upload") + "Content-Length: " + n + "\r\n\r\n");
    CHECK(client.send_generated(size));
    const auto response = client.read_response();
    CHECK(response.status == 200);
    CHECK(response.body == n + "\n");
  }
  SUBCASE("up, in chunks") {
    client.send(start("POST", "/upload") +
                "Transfer-Encoding: chunked\r\n\r\n");
    std::string data(1 << 20, 0);
    for (std::uint64_t at = 0; at < size; at += data.size()) {
      data.resize(static_cast<std::size_t>(
          std::min<std::uint64_t>(data.size(), size - at)));
      bytes::fill(&data[0], data.size(), at);
      char length[32];
      std::snprintf(length, sizeof(length), "%zx\r\n", data.size());
      REQUIRE(client.send(length + data + "\r\n"));
    }
    CHECK(client.send("0\r\n\r\n"));
    const auto response = client.read_response();
    CHECK(response.status == 200);
    CHECK(response.body == n + "\n");
  }
  MESSAGE("peak of the resident set: ", before, " kB, then ",
          peak_rss_kb(serve.pid()), " kB");
  if (!sanitized) { CHECK(peak_rss_kb(serve.pid()) < before + 1024); }
}
