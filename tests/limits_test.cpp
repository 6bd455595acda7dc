// Limits on heads, connections, descriptors and processes.

#include "load.hpp"
#include "malformed.hpp"
#include "restricted.hpp"

using namespace support;

namespace {

// How many lines the proxy has logged that contain `text`.
auto lines_with(const ServeProcess &proxy, const std::string &text) {
  const auto lines = lines_of(proxy.err());
  return std::count_if(lines.begin(), lines.end(), [&](const auto &line) {
    return line.find(text) != std::string::npos;
  });
}

} // namespace

TEST_CASE("limits: a request head over 64 KB is refused") {
  Stage stage(answering(ok()));
  const std::string start = "GET / HTTP/1.1\r\nHost: test\r\n";
  const auto padded = [&](std::size_t size) {
    const auto length = size - start.size() - std::strlen("X: \r\n\r\n");
    return start + "X: " + std::string(length, 'x') + "\r\n\r\n";
  };
  CHECK(exchange(stage.port(), padded(64 * 1024)).status == 200);
  const auto before = stage.target.received().size();
  for (const auto &head :
       {padded(64 * 1024 + 1), padded(200000),
        "GET /" + std::string(70000, 'x') + " HTTP/1.1\r\nHost: test\r\n\r\n",
        std::string(70000, 'x')}) {
    RawClient client(stage.port());
    client.send(head);
    check_refused(client, 431);
  }
  CHECK(stage.target.received().size() == before);
}

TEST_CASE("limits: too many header lines or connection options are refused") {
  Stage stage(answering(ok()));
  const std::string start = "GET / HTTP/1.1\r\nHost: test\r\n";
  const auto times = [](int n, const std::string &text) {
    std::string all;
    while (n-- > 0) {
      all += text;
    }
    return all;
  };
  for (const auto &[sent, status] :
       {std::pair<std::string, int>{start + times(999, "X: 1\r\n"), 200},
        {start + times(1000, "X: 1\r\n"), 431},
        {start + times(20000, "X:\r\n"), 431},
        {start + "Connection: " + times(99, "x,") + "x\r\n", 200},
        {start + "Connection: " + times(100, "x,") + "x\r\n", 431}}) {
    const auto before = stage.target.received().size();
    RawClient client(stage.port());
    client.send(sent + "\r\n");
    if (status == 200) {
      CHECK(client.read_response().status == 200);
    } else {
      check_refused(client, 431);
      CHECK(stage.target.received().size() == before);
    }
  }
}

TEST_CASE("limits: more connections than max_connections") {
  Watched proxy(served("16"));
  const auto before = at_rest(proxy, 10);
  // The connection for the status is idle, so it makes room for the 16th.
  TemporaryDirectory directory;
  const auto gate = directory / "gate";
  std::list<RawClient> inside;
  for (int i = 0; i < 16; ++i) {
    inside.emplace_back(proxy.port());
    inside.back().send("GET /sse?n=2&gate=" + gate +
                       " HTTP/1.1\r\nHost: test\r\n\r\n");
    inside.back().read_until("data: 1\n\n");
  }
  const int count = in_full ? 2000 : 200;
  SUBCASE("with a request get 503 and Retry-After") {
    for (int i = 0; i < count; ++i) {
      const auto response = get(proxy.port(), "/pid");
      CHECK(response.status == 503);
      CHECK(response.header("Retry-After") != "");
      CHECK(response.header("Connection") == "close");
    }
    std::vector<std::thread> threads;
    std::atomic<int> told{0}, good{0};
    for (int i = 0; i < 50; ++i) { // and all at once
      threads.emplace_back([&] {
        const auto status = get(proxy.port(), "/pid").status;
        ++(status == 503 ? told : good);
      });
    }
    for (auto &thread : threads) {
      thread.join();
    }
    CHECK(told == 50);
    CHECK(good == 0);
  }
  SUBCASE("without a request do not keep others from their 503") {
    std::list<RawClient> silent;
    for (int i = 0; i < 24; ++i) {
      silent.emplace_back(proxy.port());
    }
    CHECK(get(proxy.port(), "/pid", "", Milliseconds(60000)).status == 503);
  }
  SUBCASE("that disconnect leave nothing behind") {
    for (int i = 0; i < count; ++i) {
      RawClient client(proxy.port());
      if (i % 3 == 1) { client.send("GET /p"); }
      if (i % 3 == 2) { client.send(get_pid); }
      i % 2 ? client.reset() : client.close();
    }
  }
  CHECK(proxy.figures().threads == before.threads);
  // The backlog is empty then: whoever is accepted later would have those
  // inside make room, as soon as they are idle.
  CHECK(get(proxy.port(), "/pid", "", Milliseconds(60000)).status == 503);
  write_file(gate, "");
  for (auto &client : inside) { // none was disturbed
    client.read_until("0\r\n\r\n");
    CHECK(client.get("/pid").status == 200);
  }
  inside.clear();
  CHECK(wait_for([&] { return get(proxy.port(), "/pid").status == 200; }));
  CHECK(proxy.alone());
  CHECK(proxy.reaches("cold"));
  CHECK(proxy.comes_back_to(before));
}

// UBSan needs descriptors itself, and none may be left for it.
TEST_CASE("limits: 256 descriptors" * doctest::skip(sanitized)) {
  auto environment = serve_fake();
  environment["WARMPROXY_IDLE_STOP"] = "100ms";
  Within proxy("ulimit -n 256; exec \"$@\"", environment);
  CHECK(hard_limit(proxy.pid(), RLIMIT_NOFILE) == 256);
  // More than there is room for, each with a request in progress.
  const std::string wait = "GET /slow?ms=500 HTTP/1.1\r\nHost: test\r\n\r\n";
  CHECK(get(proxy.port(), "/pid").status == 200);
  const auto calm = open_fds(proxy.pid());
  std::size_t good = 0, told = 0, unconnected = 0;
  std::list<RawClient> clients;
  for (int i = 0; i < 300; ++i) {
    clients.emplace_back(proxy.port());
    clients.back().send(wait);
  }
  for (auto &client : clients) {
    const auto response = client.read_response();
    CHECK(response.complete);
    if (response.status == 200) { ++good; }
    if (response.status == 503) {
      ++told;
      unconnected += response.body != "warmproxy: too many connections\n";
      CHECK(response.header("Retry-After") != "");
    }
    client.close(); // makes room for the next
  }
  MESSAGE(good, " served, ", told, " told to come back");
  CHECK(good + told == 300);
  CHECK(good >= 80);
  CHECK(told >= 1);
  // Most of those who are accepted have descriptors for both connections.
  CHECK(unconnected < good / 4);
  CHECK(wait_for([&] { return open_fds(proxy.pid()) <= calm; }));
  serves(proxy);
}

TEST_CASE("limits: few descriptors are enough for a burst of first requests" *
          doctest::skip(sanitized)) {
  const auto loops = std::clamp<unsigned>(std::thread::hardware_concurrency(),
                                          1, WARMPROXY_MAX_LOOPS);
  for (const unsigned more : {0u, 8u}) {
    const auto limit = 14 + 3 * loops + more; // with two loops, 20 and 28
    CAPTURE(limit);
    Within proxy("ulimit -n " + std::to_string(limit) + "; exec \"$@\"",
                 serve_fake());
    std::list<RawClient> clients;
    for (int i = 0; i < 40; ++i) {
      clients.emplace_back(proxy.port());
      clients.back().send("GET /slow?ms=100 HTTP/1.1\r\nHost: test\r\n\r\n");
    }
    std::size_t good = 0, told = 0;
    for (auto &client : clients) {
      const auto status = client.read_response().status;
      good += status == 200;
      told += status == 503;
      client.close();
    }
    CHECK(good + told == 40);
    CHECK(good >= 1);
    CHECK(wait_for([&] { return get(proxy.port(), "/pid").status == 200; }));
    proxy.signal(SIGTERM);
    CHECK(proxy.wait() == 0);
  }
}

TEST_CASE("limits: idle upstream connections make room for new ones") {
  Within proxy("ulimit -n 256; exec \"$@\"", serve_fake());
  std::list<RawClient> clients;
  const std::string get = "GET /pid HTTP/1.1\r\nHost: test\r\n\r\n";
  const std::string post = "POST /slow?ms=300 HTTP/1.1\r\nHost: test\r\n"
                           "Content-Length: 0\r\n\r\n";
  const auto all = [&](const std::string &request) {
    for (auto &client : clients) {
      client.send(request);
    }
    int good = 0;
    for (auto &client : clients) {
      good += client.read_response().status == 200;
    }
    return good;
  };
  for (int i = 0; i < 100; ++i) {
    clients.emplace_back(proxy.port());
  }
  CHECK(all(get) == 100);
  // So long that a POST must not use an idle connection.
  for (int i = 0; i < 3; ++i) {
    CHECK(rests(proxy.pid()));
  }
  CHECK(all(post) == 100);
}

TEST_CASE("limits: no descriptor is left for a client connection") {
  ServeProcess proxy(serve_fake());
  RawClient inside(proxy.port());
  CHECK(inside.get("/pid").status == 200);
  const auto most = std::to_string(hard_limit(proxy.pid(), RLIMIT_NOFILE));
  limit(proxy.pid(), "nofile=" + next_fd(proxy.pid()));
  RawClient outside(proxy.port());
  outside.send("GET /pid HTTP/1.1\r\nHost: test\r\n\r\n");
  CHECK(rests(proxy.pid()));
  CHECK(!outside.readable());
  // Existing connections are served.
  CHECK(inside.get("/pid").status == 200);
  SUBCASE("until the limit is raised") { limit(proxy.pid(), "nofile=" + most); }
  SUBCASE("until a client disconnects") {
    if (sanitized) { return; } // UBSan needs one itself
    inside.close();
  }
  CHECK(outside.read_response().status == 200);
}

// The program around a Proxy may open many files itself.
TEST_CASE("limits: a lasting shortage of descriptors closes idle connections" *
          doctest::skip(sanitized)) { // UBSan needs one itself
  rlimit before{};
  getrlimit(RLIMIT_NOFILE, &before);
  const rlimit low{250, before.rlim_max};
  setrlimit(RLIMIT_NOFILE, &low);
  {
    std::atomic<int> lines{0};
    auto options = fake_target();
    options.log = [&](std::string_view line) {
      lines += line.find("cannot accept connections: Too many open") == 0;
    };
    RunningProxy proxy(options);
    std::list<RawClient> idle;
    for (int i = 0; i < 4; ++i) {
      idle.emplace_back(proxy.port());
      CHECK(idle.back().post("/echo", "x").status == 200);
    }
    std::vector<int> others;
    const auto leave = [&](int descriptors) {
      for (int fd = dup(0); fd >= 0; fd = dup(0)) {
        others.push_back(fd);
      }
      for (; descriptors > 0; --descriptors) {
        close(others.back());
        others.pop_back();
      }
    };
    {
      leave(2); // for both sides of this connection
      RawClient last(proxy.port());
      CHECK(wait_for([&] { return proxy.status().connections == 5; }));
      // Nobody waits for a descriptor.
      CHECK(!wait_for([&] { return idle.front().readable(); },
                      Milliseconds(1500)));
      CHECK(lines == 0);
    }
    for (std::size_t left = 4; left > 1; --left) {
      CHECK(wait_for([&] { return proxy.status().connections <= left; }));
      leave(1); // for our side
      CHECK(get(proxy.port(), "/pid").status == 200);
    }
    CHECK(idle.front().at_end());
    CHECK(lines == 1);
    for (const int fd : others) {
      close(fd);
    }
  }
  setrlimit(RLIMIT_NOFILE, &before);
}

TEST_CASE("limits: no descriptor is left for finding a port" *
          doctest::skip(sanitized)) {
  Watched proxy(serve_fake());
  RawClient client(proxy.port());
  CHECK(client.get("/-/status").status == 200);
  const auto most = std::to_string(hard_limit(proxy.pid(), RLIMIT_NOFILE));
  limit(proxy.pid(), "nofile=" + next_fd(proxy.pid()));
  CHECK(client.get("/pid").status == 502);
  CHECK(proxy.printed("cannot find a free port: Too many open files"));
  limit(proxy.pid(), "nofile=" + most);
  CHECK(wait_for([&] { return client.get("/pid").status == 200; }));
}

// A failed allocation costs one connection at most.
TEST_CASE("limits: no memory is left for client connections" *
          doctest::skip(!on_linux || sanitized)) {
  for (const int room : {100, 1000, 3000}) { // in KB
    CAPTURE(room);
    ServeProcess proxy(serve_fake());
    CHECK(get(proxy.port(), "/pid").status == 200);
    const auto used = proc_status(proxy.pid(), "VmSize") + room;
    limit(proxy.pid(), "as=" + std::to_string(used * 1024));
    std::list<RawClient> clients;
    for (int i = 0; i < 300; ++i) {
      clients.emplace_back(proxy.port());
      clients.back().send("GET / HTTP/1.1\r\nHost: test\r\nA: " +
                          std::string(30000, 'a'));
    }
    CHECK(rests(proxy.pid()));
    clients.clear();
    CHECK(wait_for([&] {
      try {
        return get(proxy.port(), "/pid").status == 200;
      } catch (const std::exception &) { return false; }
    }));
    proxy.signal(SIGTERM);
    CHECK(proxy.wait() == 0);
  }
}

// poll(2) takes no more descriptors than may be open, and UBSan needs one.
TEST_CASE("limits: no descriptor is left for an upstream connection" *
          doctest::skip(!on_linux || sanitized)) {
  Watched proxy(serve_fake());
  RawClient client(proxy.port());
  CHECK(client.get("/pid").status == 200);
  // No event loop has an idle upstream connection.
  std::list<RawClient> slow;
  for (int i = 0; i < 8; ++i) {
    slow.emplace_back(proxy.port());
    slow.back().send("GET /slow?ms=600000 HTTP/1.1\r\nHost: test\r\n\r\n");
  }
  CHECK(wait_for([&] { return proxy.number("in_flight") == 8; }));
  const auto most = std::to_string(hard_limit(proxy.pid(), RLIMIT_NOFILE));
  limit(proxy.pid(), "nofile=3");
  const auto response = client.get("/pid");
  CHECK(response.status == 503);
  CHECK(response.body == "warmproxy: cannot connect to the target: "
                         "Too many open files\n");
  CHECK(response.header("Retry-After") != "");
  CHECK(client.get("/pid").status == 503);
  CHECK(lines_with(proxy, "cannot connect to the target: Too many") == 1);
  CHECK(rests(proxy.pid()));
  limit(proxy.pid(), "nofile=" + most);
  CHECK(client.get("/pid").status == 200);
  CHECK(proxy.number("starts") == 1);
}

// Those that are private to other clients hold descriptors, too.
TEST_CASE("limits: idle upstream connections are closed when a new one finds "
          "no descriptor" *
          doctest::skip(!on_linux || sanitized)) {
  Watched proxy(serve_fake());
  std::list<RawClient> clients;
  for (int i = 0; i < 8; ++i) {
    clients.emplace_back(proxy.port());
    CHECK(clients.back().post("/echo", "x").status == 200);
  }
  RawClient client(proxy.port());
  CHECK(client.get("/-/status").status == 200);
  limit(proxy.pid(), "nofile=" + next_fd(proxy.pid()));
  CHECK(client.get("/pid").status == 503);
  const Milliseconds less_than_their_idle_timeout(10000);
  CHECK(wait_for([&] { return client.get("/pid").status == 200; },
                 less_than_their_idle_timeout));
}

TEST_CASE("limits: no process is left for the target") {
  const auto as = getuid() == 0 ? someone : std::string();
  if (!can(as + "true")) { return; }
  ForAnyUser files;
  Within proxy("exec " + as + "\"$@\"", files.served(), files / "warmproxy");
  RawClient inside(proxy.port());
  CHECK(inside.get("/-/status").status == 200);
  // There is no such limit for root.
  limit(proxy.pid(), "nproc=1", as);

  const auto response = inside.get("/pid");
  CHECK(response.status == 502);
  CHECK(response.body.find("cannot be started: Resource temporarily") !=
        std::string::npos);

  RawClient outside(proxy.port());
  outside.send("GET /pid HTTP/1.1\r\nHost: test\r\n\r\n");
  CHECK(outside.read_response().status == 503);
  CHECK(rests(proxy.pid()));

  limit(proxy.pid(), "nproc=10000", as);
  CHECK(wait_for([&] { return inside.get("/pid").status == 200; }));
  serves(proxy);
}

TEST_CASE("limits: the longest idle connection makes room for a new one") {
  auto options = fake_target();
  options.max_connections = 8;
  RunningProxy proxy(options);
  std::list<RawClient> idle;
  for (int i = 0; i < 8; ++i) {
    idle.emplace_back(proxy.port());
    CHECK(idle.back().get("/pid").status == 200);
  }
  // The first one is the most recently used now.
  CHECK(idle.front().get("/pid").status == 200);
  for (int i = 0; i < 20; ++i) {
    RawClient client(proxy.port());
    CHECK(client.get("/pid").status == 200);
    if (i == 0) {
      CHECK(std::next(idle.begin())->at_end());
      CHECK(!idle.front().readable());
      CHECK(!idle.back().readable());
    }
  }
}

TEST_CASE("limits: a connection with a request in progress makes no room") {
  auto options = fake_target();
  options.max_connections = 2;
  RunningProxy proxy(options);
  TemporaryDirectory directory;
  const auto gate = directory / "gate";
  RawClient stream(proxy.port()), idle(proxy.port());
  stream.send("GET /sse?n=2&gate=" + gate + " HTTP/1.1\r\nHost: test\r\n\r\n");
  stream.read_until("data: 1\n\n");
  CHECK(idle.get("/pid").status == 200);
  // The response is read before its connection counts as idle.
  std::list<RawClient> first;
  CHECK(wait_for([&] {
    first.emplace_back(proxy.port());
    return first.back().get("/pid").status == 200;
  }));
  CHECK(idle.at_end());
  first.back().send("GET /slow?ms=600000 HTTP/1.1\r\nHost: test\r\n\r\n");
  CHECK(wait_for([&] { return proxy.status().in_flight == 2; }));
  const auto refused = get(proxy.port(), "/pid");
  CHECK(refused.status == 503);
  CHECK(refused.header("Retry-After") != "");
  write_file(gate, "");
  stream.read_until("0\r\n\r\n");
}

TEST_CASE("limits: many new connections at once replace idle ones") {
  auto environment = serve_fake();
  environment["WARMPROXY_MAX_CONNECTIONS"] = "4";
  ServeProcess proxy(environment);
  std::list<RawClient> clients;
  for (int i = 0; i < 4; ++i) {
    clients.emplace_back(proxy.port());
    CHECK(clients.back().get("/pid").status == 200);
  }
  // All that connect meanwhile are accepted in one batch.
  proxy.signal(SIGSTOP);
  for (int i = 0; i < 16; ++i) {
    clients.emplace_back(proxy.port());
    clients.back().send(get_pid);
  }
  proxy.signal(SIGCONT);
  int served = 0;
  for (auto client = std::next(clients.begin(), 4); client != clients.end();
       ++client) {
    const auto status = client->read_response().status;
    CHECK((status == 200 || status == 503));
    served += status == 200;
  }
  CHECK(served >= 1);
  CHECK(wait_for([&] {
    return std::count_if(clients.begin(), clients.end(),
                         [](RawClient &c) { return !c.readable(); }) <= 4;
  }));
}

TEST_CASE("limits: a connection that only awaits its close makes room") {
  auto options = fake_target();
  options.max_connections = 1;
  RunningProxy proxy(options);
  RawClient client(proxy.port());
  CHECK(client.get("/pid", "Connection: close\r\n").status == 200);
  CHECK(client.at_end());
  CHECK(wait_for([&] {
    client.send("x"); // keeps it from being closed as an inactive one
    return get(proxy.port(), "/pid").status == 200;
  }));
}

// RFC 9112, section 2.2: they are not part of the request.
TEST_CASE("limits: a request behind an empty line makes no room") {
  auto environment = serve_fake();
  environment["WARMPROXY_MAX_CONNECTIONS"] = "1";
  ServeProcess proxy(environment);
  RawClient client(proxy.port());
  client.send(get_pid + "\r"); // read together
  CHECK(client.read_response().status == 200);
  client.send("\n");
  CHECK(rests(proxy.pid())); // it has been read
  client.send("GET /sse?n=2&gate=/never HTTP/1.1\r\nHost: test\r\n\r\n");
  client.read_until("data: 1\n\n");
  CHECK(get(proxy.port(), "/pid").status == 503);
}

// Few connections are accepted beyond the limit, so each must end soon.
TEST_CASE("limits: a refused client that goes on sending is closed") {
  auto options = fake_target();
  options.max_connections = 1;
  RunningProxy proxy(options);
  RawClient stream(proxy.port());
  stream.send("GET /sse?n=2&gate=/never HTTP/1.1\r\nHost: test\r\n\r\n");
  stream.read_until("data: 1\n\n");
  RawClient refused(proxy.port());
  CHECK(refused.get("/pid").status == 503);
  CHECK(wait_for([&] { return !refused.send("x"); }));
}
