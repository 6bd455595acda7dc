// Stopping on request: requests in progress may finish, and no process stays
// behind.

#include "in_progress.hpp"

#include <sys/syscall.h>

using namespace support;

TEST_CASE("drain: costs no CPU time while the target ends its streams") {
  ServeProcess proxy(serve_fake({"--term-delay", "600000"}));
  RawClient stream(proxy.port());
  stream.send("GET /sse?n=2&gate=/nonexistent HTTP/1.1\r\nHost: test\r\n\r\n");
  stream.read_until("data: 1\n\n");
  proxy.signal(SIGTERM);
  CHECK(proxy.printed("stopping"));
  CHECK(rests(proxy.pid()));
}

TEST_CASE("drain: what is in progress may finish") {
  TemporaryDirectory directory;
  for (const auto &activity : activities(directory)) {
    CAPTURE(activity.name);
    for (const int signal : {SIGTERM, SIGINT, SIGQUIT}) {
      unlink((directory / "gate").c_str());
      Marked proxy(activity.args);
      RawClient idle(proxy.port());
      if (activity.name != "a start") { CHECK(idle.get("/pid").status == 200); }
      RawClient client(proxy.port());
      begin(activity, proxy, client);
      proxy.signal(signal);
      CHECK(proxy.printed("stopping"));
      // New connections are refused, idle ones are closed.
      CHECK(wait_for([&] { return !listening(proxy.port()); }));
      CHECK(idle.at_end());
      // An event stream is ended by the target, which gets SIGTERM at once.
      if (activity.name != "a stream") { CHECK(proxy.running()); }
      activity.on(client);
      CHECK(client.read_to_end() == "");
      client.close(); // warmproxy waits for it to have read everything
      CHECK(proxy.wait() == 0);
      CHECK(proxy.nothing_left());
      CHECK(proxy.err().find("aborted") == std::string::npos);
    }
  }
}

TEST_CASE("drain: an aborted close-delimited response ends with a reset") {
  Marked proxy({}, {{"WARMPROXY_STOP_TIMEOUT", "200ms"}});
  RawClient client(proxy.port());
  client.send("GET /close?n=50000000 HTTP/1.1\r\nHost: test\r\n\r\n");
  CHECK(client.read_response_head().status == 200);
  proxy.signal(SIGTERM);
  CHECK(proxy.wait() == 0);
  CHECK(client.read_to_end().size() < 50000000);
  CHECK(client.was_reset());
}

TEST_CASE("drain: requests that were not accepted yet are served") {
  constexpr int many = 600; // more than are accepted in one batch
  Marked proxy({});
  CHECK(get(proxy.port(), "/pid").status == 200);
  proxy.signal(SIGSTOP);
  std::list<RawClient> early;
  for (int i = 0; i < many; ++i) {
    early.emplace_back(proxy.port());
    if (i % 2 == 0) {
      early.back().send("GET /pid HTTP/1.1\r\nHost: test\r\n\r\n");
    }
  }
  proxy.signal(SIGTERM);
  proxy.signal(SIGCONT);
  for (int i = 0; i < many; ++i, early.pop_front()) {
    if (i % 2 == 0) { CHECK(early.front().read_response().status == 200); }
    CHECK(early.front().at_end());
  }
  CHECK(proxy.wait() == 0);
  CHECK(proxy.nothing_left());
}

TEST_CASE("drain: a response says that its connection closes") {
  Gate gate;
  Stage stage([&](TargetConnection &c) {
    while (!c.read_head().empty()) {
      gate.wait();
      c.send(ok());
    }
  });
  RawClient client(stage.port());
  client.send("GET / HTTP/1.1\r\nHost: test\r\n\r\n");
  stage.target.request();
  stage.proxy.proxy().stop();
  gate.open();
  const auto response = client.read_response();
  CHECK(response.status == 200);
  CHECK(response.header("Connection") == "close");
  CHECK(client.at_end());
}

TEST_CASE("drain: a request head that stays incomplete has a second") {
  Marked proxy({}, {{"WARMPROXY_STOP_TIMEOUT", "10m"}});
  RawClient idle(proxy.port()), slow(proxy.port()), late(proxy.port());
  CHECK(idle.get("/pid").status == 200);
  for (auto *client : {&slow, &late}) {
    client->send("GET /pid HTTP/1.1\r\n");
  }
  proxy.signal(SIGTERM);
  CHECK(idle.at_end());
  late.send("Host: test\r\n\r\n");
  CHECK(late.read_response().status == 200);
  CHECK(slow.read_response().status == 408);
  for (auto *client : {&slow, &late}) {
    client->close();
  }
  CHECK(proxy.wait() == 0);
}

TEST_CASE("drain: stop_timeout ends everything") {
  TemporaryDirectory directory;
  auto all = activities(directory);
  all.push_back({"nothing", {}, "", "", nullptr});
  for (const auto &activity : all) {
    CAPTURE(activity.name);
    unlink((directory / "gate").c_str());
    auto args = activity.args;
    if (activity.name == "a start") { args = {"--never-listen"}; }
    if (activity.name == "a stream") { args = {}; } // not a polite one
    args.insert(args.end(), {"--fork-worker", "--ignore-term"});
    Marked proxy(args, {{"WARMPROXY_STOP_TIMEOUT", "200ms"},
                        {"WARMPROXY_PREWARM", "1"}});
    // warmproxy, the watchdog process, the target, its worker
    CHECK(wait_for([&] { return proxy.processes().size() == 4; }));
    RawClient client(proxy.port());
    if (activity.on) {
      auto forever = activity;
      if (activity.name == "a request") {
        forever.request = "GET /slow?ms=600000 HTTP/1.1\r\nHost: test\r\n\r\n";
      }
      if (activity.name == "a download") {
        forever.request =
            "GET /bytes?n=99999999999 HTTP/1.1\r\nHost: test\r\n\r\n";
      }
      begin(forever, proxy, client);
    }
    proxy.signal(SIGTERM);
    CHECK(proxy.wait() == 0);
    CHECK(proxy.nothing_left());
    // It does not look complete.
    const auto rest = client.read_to_end();
    CHECK(rest.find("0\r\n\r\n") == std::string::npos);
    CHECK(rest.find("200 OK") == std::string::npos);
  }
}

TEST_CASE("drain: a second signal ends warmproxy and the target at once") {
  TemporaryDirectory directory;
  for (const auto &activity : activities(directory)) {
    CAPTURE(activity.name);
    unlink((directory / "gate").c_str());
    auto args = activity.args;
    args.insert(args.end(), {"--fork-worker", "--ignore-term"});
    if (activity.name == "a start") { args.push_back("--never-listen"); }
    Marked proxy(args, {{"WARMPROXY_STOP_TIMEOUT", "10m"}});
    RawClient client(proxy.port());
    begin(activity, proxy, client);
    proxy.signal(SIGTERM);
    CHECK(proxy.printed("stopping"));
    // It logs this before it handles the second one.
    CHECK(wait_for([&] {
      proxy.signal(SIGINT);
      return !proxy.running();
    }));
    CHECK(proxy.wait() == 128 + SIGINT);
    CHECK(proxy.nothing_left());
  }
}

// timeout(1) sends it to its child and to its process group.
TEST_CASE("drain: a signal that comes twice at once counts once" *
          doctest::skip(!on_linux)) {
  ServeProcess proxy(serve_fake());
  RawClient client(proxy.port());
  client.send("GET /sse?n=2&gate=/nonexistent HTTP/1.1\r\nHost: test\r\n\r\n");
  client.read_until("data: 1\n\n");
  // Both are pending when it goes on: one for a thread, one for the process.
  proxy.signal(SIGSTOP);
  for (const auto &thread :
       std::filesystem::directory_iterator(proc_file(proxy.pid(), "task"))) {
    syscall(SYS_tgkill, proxy.pid(),
            std::stoi(thread.path().filename().string()), SIGTERM);
  }
  proxy.signal(SIGTERM);
  proxy.signal(SIGCONT);
  CHECK(proxy.printed("stopping"));
  CHECK(proxy.wait() == 0);
}

// foreman sends SIGTERM after the terminal's SIGINT, systemd's SendSIGHUP a
// SIGHUP after SIGTERM.
TEST_CASE("drain: two signals at once count once") {
  const int pairs[][2] = {
      {SIGINT, SIGTERM}, {SIGTERM, SIGHUP}, {SIGQUIT, SIGTERM}};
  for (const auto &pair : pairs) {
    CAPTURE(pair[0]);
    ServeProcess proxy(serve_fake());
    RawClient client(proxy.port());
    client.send("GET /sse?n=2&gate=/none HTTP/1.1\r\nHost: test\r\n\r\n");
    client.read_until("data: 1\n\n");
    proxy.signal(SIGSTOP); // both are pending when it goes on
    proxy.signal(pair[0]);
    proxy.signal(pair[1]);
    proxy.signal(SIGCONT);
    CHECK(proxy.printed("stopping"));
    CHECK(proxy.wait() == 0);
  }
}

TEST_CASE("drain: stop() leaves no process behind") {
  pid_t pid = 0;
  const auto started = [&](RunningProxy &proxy) {
    pid = static_cast<pid_t>(std::stol(get(proxy.port(), "/pid").body));
    CHECK(!children_in_group(pid).empty());
  };
  SUBCASE("a target that dies of SIGTERM") {
    RunningProxy proxy(fake_target());
    started(proxy);
    CHECK(proxy.stop());
  }
  SUBCASE("a slow one") {
    RunningProxy proxy(fake_target({"--term-delay", "200"}));
    started(proxy);
    CHECK(proxy.stop());
  }
  SUBCASE("one with a worker that ignores SIGTERM") {
    auto options = fake_target({"--fork-worker"});
    options.stop_timeout = Milliseconds(100);
    RunningProxy proxy(options);
    started(proxy);
    proxy.stop();
  }
  SUBCASE("one that ignores SIGTERM") {
    auto options = fake_target({"--ignore-term"});
    options.stop_timeout = Milliseconds(100);
    RunningProxy proxy(options);
    started(proxy);
    proxy.stop();
  }
  SUBCASE("one that is starting") {
    TemporaryDirectory directory;
    auto options =
        fake_target({"--never-listen", "--count-file", directory / "starts"});
    options.prewarm = true;
    RunningProxy proxy(options);
    REQUIRE(wait_for([&] { return read_file(directory / "starts") != ""; }));
    pid = static_cast<pid_t>(std::stol(read_file(directory / "starts")));
    proxy.stop();
  }
  SUBCASE("none") {
    RunningProxy proxy(fake_target());
    CHECK(proxy.stop());
    return;
  }
  CHECK(children_in_group(pid).empty());
}

TEST_CASE("drain: signals that the parent ignores stay ignored") {
  // As nohup does, and a shell for background jobs.
  Within proxy("trap '' HUP INT QUIT; exec \"$@\"", serve_fake());
  CHECK(get(proxy.port()).status == 200);
  for (const int number : {SIGHUP, SIGINT, SIGQUIT}) {
    proxy.signal(number);
  }
  CHECK(get(proxy.port()).status == 200);
  CHECK(proxy.err().find("stopping") == std::string::npos);
  proxy.signal(SIGTERM);
  CHECK(proxy.wait() == 0);
}

// npm, cross-env, dotenv-cli and tsx pass SIGTERM on to the server that they
// started; a second one ends many servers at once.
TEST_CASE("drain: SIGTERM reaches a server once, launched directly or not") {
  TemporaryDirectory directory;
  const auto signals = directory / "signals";
  const std::vector<std::string> polite = {"--polite", "--term-file", signals};
  auto launched = polite;
  launched.push_back("--launcher");
  for (const auto &args : {polite, launched}) {
    CAPTURE(args.size());
    for (const std::string path : {"/sse?n=2&gate=/never", "/ws", "/pid"}) {
      CAPTURE(path);
      unlink(signals.c_str());
      Marked proxy(args);
      RawClient client(proxy.port());
      client.send("GET " + path +
                  " HTTP/1.1\r\nHost: test\r\nConnection: Upgrade\r\n"
                  "Upgrade: echo\r\n\r\n");
      if (path == "/pid") {
        CHECK(client.read_response().status == 200);
      } else {
        client.read_until(path == "/ws" ? "\r\n\r\n" : "data: 1\n\n");
      }
      proxy.signal(SIGTERM);
      if (path == "/ws") {
        CHECK(client.read_to_end() == "bye");
      } else if (path != "/pid") {
        client.read_until("0\r\n\r\n");
      }
      client.close();
      CHECK(proxy.wait() == 0);
      CHECK(read_file(signals) == "SIGTERM\nexit\n");
      CHECK(proxy.nothing_left());
    }
  }
}

// A plain shell dies of SIGTERM, and its child has to be told then.
TEST_CASE("drain: the rest of the process group gets SIGTERM, too") {
  TemporaryDirectory directory;
  const auto signals = directory / "signals";
  warmproxy::Options options;
  options.binary = "/bin/sh";
  options.args = {"-c", "\"$0\" --polite --term-file \"$1\" & wait",
                  built("fake"), signals};
  SUBCASE("after a tenth of a short stop_timeout") {
    options.stop_timeout = Milliseconds(4000);
  }
  SUBCASE("soon, however long stop_timeout is") {
    options.stop_timeout = std::chrono::minutes(10);
  }
  RunningProxy proxy(options);
  CHECK(get(proxy.port(), "/pid").status == 200);
  const auto group = static_cast<pid_t>(proxy.status().pid);
  const auto began = Clock::now();
  proxy.stop();
  CHECK(Clock::now() - began < patience);
  CHECK(read_file(signals) == "SIGTERM\nexit\n");
  CHECK(children_in_group(group).empty());
}

TEST_CASE("drain: after a crash the rest of the group gets SIGTERM first") {
  TemporaryDirectory directory;
  const auto signals = directory / "signals", ready = directory / "ready";
  warmproxy::Options options;
  options.binary = "/bin/sh";
  options.args = {"-c",
                  "(trap 'echo SIGTERM >>\"$1\"; exit' TERM; : >\"$2\"; "
                  "while :; do sleep 0.02; done) & exec \"$0\"",
                  built("fake"), signals, ready};
  options.stop_timeout = Milliseconds(4000);
  RunningProxy proxy(options);
  CHECK(get(proxy.port(), "/pid").status == 200);
  CHECK(wait_for([&] { return access(ready.c_str(), F_OK) == 0; }));
  const auto group = static_cast<pid_t>(proxy.status().pid);
  kill_one(group);
  CHECK(wait_for([&] { return children_in_group(group).empty(); }));
  CHECK(read_file(signals) == "SIGTERM\n");
  CHECK(wait_for([&] { return get(proxy.port(), "/pid").status == 200; }));
}

// Some servers exit only when all connections are closed.
TEST_CASE("drain: idle upstream connections are closed before SIGTERM") {
  auto options = fake_target({"--polite"});
  options.stop_timeout = Milliseconds(15000);
  SUBCASE("by stop() of an embedding program that keeps the Proxy") {
    RunningProxy proxy(options);
    std::list<RawClient> clients;
    for (int i = 0; i < 10; ++i) {
      clients.emplace_back(proxy.port());
      // One private upstream connection, one shared.
      CHECK(clients.back().post("/echo", "x").status == 200);
      CHECK(clients.back().get("/pid").status == 200);
    }
    CHECK(proxy.stop());
    CHECK(proxy.status().last_exit == "exited with status 0");
  }
  SUBCASE("by stop() when no client is left") {
    RunningProxy proxy(options);
    CHECK(get(proxy.port(), "/pid").status == 200);
    CHECK(wait_for([&] { return proxy.status().connections == 0; }));
    CHECK(proxy.stop());
    CHECK(proxy.status().last_exit == "exited with status 0");
  }
  SUBCASE("on idle stop") {
    options.idle_stop = Milliseconds(100);
    RunningProxy proxy(options);
    RawClient client(proxy.port());
    CHECK(client.post("/echo", "x").status == 200);
    CHECK(client.get("/pid").status == 200);
    CHECK(wait_for([&] { return proxy.status().state == "cold"; }));
    CHECK(proxy.status().last_exit == "exited with status 0");
  }
}

// Nobody waits for a client that has its response and does not close.
TEST_CASE("drain: a connection that only awaits its close delays nothing") {
  auto options = fake_target();
  options.stop_timeout = std::chrono::minutes(10);
  RunningProxy proxy(options);
  RawClient client(proxy.port());
  CHECK(client.get("/pid", "Connection: close\r\n").status == 200);
  CHECK(client.at_end());
  proxy.proxy().stop();
  CHECK(wait_for([&] {
    client.send("x"); // keeps it from being closed as an inactive one
    return proxy.status().pid == 0;
  }));
  client.close();
  CHECK(proxy.stop());
}

TEST_CASE("drain: at half time the target gets SIGTERM, requests or not") {
  auto options = fake_target({"--term-delay", "1"});
  options.stop_timeout = Milliseconds(3000);
  RunningProxy proxy(options);
  RawClient client(proxy.port());
  client.send("GET /slow?ms=600000 HTTP/1.1\r\nHost: test\r\n\r\n");
  CHECK(wait_for([&] { return proxy.status().in_flight == 1; }));
  CHECK(proxy.stop());
  CHECK(proxy.status().last_exit == "exited with status 0");
}

// What requests have used of it is gone.
TEST_CASE("drain: requests and the target's end have one budget together") {
  auto options = fake_target({"--term-delay", "3000"});
  options.stop_timeout = Milliseconds(4000);
  RunningProxy proxy(options);
  RawClient client(proxy.port());
  client.send("GET /slow?ms=600000 HTTP/1.1\r\nHost: test\r\n\r\n");
  CHECK(wait_for([&] { return proxy.status().in_flight == 1; }));
  CHECK(proxy.stop());
  // At half time it has 2 s left, less than it takes.
  CHECK(proxy.status().last_exit == "was killed by signal 9");
}

// With a target that does not end its streams on SIGTERM, requests get half of
// the budget, and everything ends with it.
TEST_CASE("drain: a request finishes beside streams that do not end") {
  TemporaryDirectory directory;
  Marked proxy({"--ignore-term"}, {{"WARMPROXY_STOP_TIMEOUT", "3s"}});
  RawClient stream(proxy.port()), client(proxy.port());
  stream.send("GET /sse?n=2&gate=" + (directory / "gate") +
              " HTTP/1.1\r\nHost: test\r\n\r\n");
  stream.read_until("data: 1\n\n");
  client.send("GET /slow?ms=500 HTTP/1.1\r\nHost: test\r\n\r\n");
  proxy.signal(SIGTERM);
  CHECK(client.read_response().body == "slow\n");
  CHECK(proxy.wait() == 0);
  CHECK(stream.read_to_end().find("0\r\n\r\n") == std::string::npos);
  CHECK(proxy.nothing_left());
}
