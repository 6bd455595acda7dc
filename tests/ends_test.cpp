// How it ends: asked to, or killed, in the middle of whatever: what could still
// finish does, and nothing that was started stays behind.

#include "figures.hpp"

using namespace support;

namespace {

// Whatever is started with it in its environment is found again by it.
std::string new_mark() {
  static std::atomic<int> count{0};
  return std::to_string(getpid()) + "-" + std::to_string(++count);
}

// build/warmproxy, marked, with a fake behind it.
class Marked : public ServeProcess {
public:
  explicit Marked(const std::vector<std::string> &args,
                  const Environment &more = {})
      : Marked(args, more, new_mark()) {}

  // Everything it started that still runs, itself and its guard with it.
  std::vector<pid_t> processes() const {
    return processes_with("MARK=" + mark_);
  }
  bool nothing_left() const {
    return wait_for([&] { return processes().empty(); });
  }

private:
  Marked(const std::vector<std::string> &args, Environment more,
         const std::string &mark)
      : ServeProcess(complete(args, std::move(more), mark)), mark_(mark) {}

  static Environment complete(const std::vector<std::string> &args,
                              Environment environment,
                              const std::string &mark) {
    auto all = serve_fake(args);
    all.merge(environment);
    all["MARK"] = mark;
    return all;
  }

  const std::string mark_;
};

// Something that is under way when the end comes.
struct Stage {
  std::string name;
  std::vector<std::string> args;       // of the fake
  std::string request;                 // what is sent, ...
  std::string seen;                    // what is awaited before the end, ...
  std::function<void(RawClient &)> on; // and how it finishes well
};

std::vector<Stage> stages(const TemporaryDirectory &directory) {
  const auto gate = directory / "gate";
  const auto request = [](const std::string &line, const std::string &more) {
    return line + " HTTP/1.1\r\nHost: test\r\n" + more + "\r\n";
  };
  return {
      {"a start",
       {"--listen-after", "300"},
       request("GET /pid", ""),
       "",
       [](RawClient &client) {
         const auto response = client.read_response();
         CHECK(response.status == 200);
         CHECK(response.complete);
         CHECK(response.header("Connection") == "close");
       }},
      {"a request",
       {},
       request("GET /slow?ms=300", ""),
       "",
       [](RawClient &client) {
         CHECK(client.read_response().body == "slow\n");
       }},
      {"a stream",
       {},
       request("GET /sse?n=3&gate=" + gate, ""),
       "data: 1\n\n",
       [gate](RawClient &client) {
         write_file(gate, "");
         client.read_until("data: 3\n\n");
         CHECK(client.read_until("0\r\n\r\n") != "");
       }},
      {"a download",
       {},
       request("GET /bytes?n=20000000", ""),
       "\r\n\r\n",
       [](RawClient &client) {
         CHECK(client.verify_generated(20000000) == 20000000);
       }},
      {"an upload",
       {},
       request("POST /upload", "Content-Length: 1000000\r\n"),
       "",
       [](RawClient &client) {
         CHECK(client.send_generated(1000000));
         CHECK(client.read_response().body == "1000000\n");
       }},
      {"a tunnel",
       {},
       request("GET /ws", "Connection: Upgrade\r\nUpgrade: echo\r\n") + "one",
       "one",
       [](RawClient &client) {
         client.send("two");
         CHECK(client.read_exact(3) == "two");
         client.shutdown_write();
       }},
  };
}

// Until it is under way as far as it gets.
void begin(const Stage &stage, const Marked &proxy, RawClient &client) {
  client.send(stage.request);
  if (!stage.seen.empty()) {
    client.read_until(stage.seen);
  } else {
    // The target runs: beside us and our guard.
    CHECK(wait_for([&] { return proxy.processes().size() > 2; }));
  }
}

} // namespace

TEST_CASE("SIGTERM lets finish what is under way") {
  TemporaryDirectory directory;
  for (const auto &stage : stages(directory)) {
    CAPTURE(stage.name);
    for (const int signal : {SIGTERM, SIGINT}) {
      unlink((directory / "gate").c_str());
      Marked proxy(stage.args);
      RawClient idle(proxy.port());
      if (stage.name != "a start") { CHECK(idle.get("/pid").status == 200); }
      RawClient client(proxy.port());
      begin(stage, proxy, client);
      proxy.signal(signal);
      CHECK(proxy.printed("stopping"));
      // Nobody new gets in, and who has nothing to wait for is let go.
      CHECK(wait_for([&] { return !listening(proxy.port()); }));
      CHECK(idle.at_end());
      CHECK(proxy.running());
      stage.on(client);
      CHECK(client.read_to_end() == "");
      client.close(); // it is waited for, to have read all
      CHECK(proxy.wait() == 0);
      CHECK(proxy.nothing_left());
      CHECK(proxy.err().find("cutting") == std::string::npos);
    }
  }
}

TEST_CASE("what only an end of the connection ends, is not ended by a cut") {
  Marked proxy({}, {{"WARMPROXY_STOP_TIMEOUT", "200ms"}});
  RawClient client(proxy.port());
  client.send("GET /close?n=50000000 HTTP/1.1\r\nHost: test\r\n\r\n");
  CHECK(client.read_response_head().status == 200);
  proxy.signal(SIGTERM);
  CHECK(proxy.wait() == 0);
  CHECK(client.read_to_end().size() < 50000000);
  CHECK(client.was_reset());
}

TEST_CASE("SIGTERM finds requests that nobody has taken yet") {
  constexpr int many = 600; // more than are accepted in one go
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

TEST_CASE("SIGTERM cuts what does not end, and stops all of the target") {
  TemporaryDirectory directory;
  auto all = stages(directory);
  all.push_back({"nothing", {}, "", "", nullptr});
  for (const auto &stage : all) {
    CAPTURE(stage.name);
    unlink((directory / "gate").c_str());
    auto args = stage.args;
    if (stage.name == "a start") { args = {"--never-listen"}; }
    args.insert(args.end(), {"--fork-worker", "--ignore-term"});
    Marked proxy(args, {{"WARMPROXY_STOP_TIMEOUT", "200ms"},
                        {"WARMPROXY_PREWARM", "1"}});
    // We, the guard, the target, its worker.
    CHECK(wait_for([&] { return proxy.processes().size() == 4; }));
    RawClient client(proxy.port());
    if (stage.on) {
      auto forever = stage;
      if (stage.name == "a request") {
        forever.request = "GET /slow?ms=600000 HTTP/1.1\r\nHost: test\r\n\r\n";
      }
      if (stage.name == "a download") {
        forever.request =
            "GET /bytes?n=99999999999 HTTP/1.1\r\nHost: test\r\n\r\n";
      }
      begin(forever, proxy, client);
    }
    proxy.signal(SIGTERM);
    CHECK(proxy.wait() == 0);
    CHECK(proxy.nothing_left());
    // Not as if it had all been said.
    const auto rest = client.read_to_end();
    CHECK(rest.find("0\r\n\r\n") == std::string::npos);
    CHECK(rest.find("200 OK") == std::string::npos);
  }
}

TEST_CASE("a second signal ends it at once, and all of the target with it") {
  TemporaryDirectory directory;
  for (const auto &stage : stages(directory)) {
    CAPTURE(stage.name);
    unlink((directory / "gate").c_str());
    auto args = stage.args;
    args.insert(args.end(), {"--fork-worker", "--ignore-term"});
    if (stage.name == "a start") { args.push_back("--never-listen"); }
    Marked proxy(args, {{"WARMPROXY_STOP_TIMEOUT", "10m"}});
    RawClient client(proxy.port());
    begin(stage, proxy, client);
    proxy.signal(SIGTERM);
    CHECK(proxy.printed("stopping"));
    // It says so before it is ready for the second one.
    CHECK(wait_for([&] {
      proxy.signal(SIGINT);
      return !proxy.running();
    }));
    CHECK(proxy.wait() == 128 + SIGINT);
    CHECK(proxy.nothing_left());
  }
}

TEST_CASE("SIGKILL leaves nothing of the target") {
  TemporaryDirectory directory;
  for (const auto &stage : stages(directory)) {
    CAPTURE(stage.name);
    for (const bool group : {false, true}) {
      CAPTURE(group);
      unlink((directory / "gate").c_str());
      auto args = stage.args;
      args.insert(args.end(), {"--fork-worker", "--ignore-term"});
      if (stage.name == "a start") { args.push_back("--never-listen"); }
      Marked proxy(args);
      RawClient client(proxy.port());
      begin(stage, proxy, client);
      CHECK(wait_for([&] { return proxy.processes().size() == 4; }));
      kill(group ? -proxy.pid() : proxy.pid(), SIGKILL);
      CHECK(proxy.wait() == 128 + SIGKILL);
      CHECK(proxy.nothing_left());
    }
  }
}

TEST_CASE("SIGKILL at any moment of a start or a stop leaves nothing") {
  const int rounds = in_full ? 300 : 30;
  for (int round = 0; round < rounds; ++round) {
    Marked proxy({"--fork-worker", "--ignore-term"},
                 {{"WARMPROXY_PREWARM", "1"},
                  {"WARMPROXY_STOP_TIMEOUT", "20ms"},
                  {"WARMPROXY_IDLE_STOP", "10ms"}});
    // It goes up and down by itself in some 40 ms.
    RawClient client(proxy.port());
    client.send("GET /pid HTTP/1.1\r\nHost: test\r\n\r\n");
    const auto until =
        Clock::now() + std::chrono::microseconds(60000 * round / rounds);
    wait_for([&] { return Clock::now() >= until; });
    kill(proxy.pid(), SIGKILL);
    CHECK(proxy.wait() == 128 + SIGKILL);
    CHECK(proxy.nothing_left());
  }
}

TEST_CASE("who kills our guard does not free the target") {
  Marked proxy({"--fork-worker"}, {{"WARMPROXY_STOP_TIMEOUT", "200ms"}});
  const auto before = proxy.processes();
  CHECK(get(proxy.port()).status == 200);
  for (const auto pid : before) {
    if (pid != proxy.pid()) { kill(pid, SIGKILL); }
  }
  CHECK(get(proxy.port()).status == 200);
  SUBCASE("with SIGTERM to us") {
    proxy.signal(SIGTERM);
    CHECK(proxy.wait() == 0);
  }
  SUBCASE("when it dies") {
    // One that dies alone, and is started again.
    const auto pid = std::atol(get(proxy.port(), "/pid").body.c_str());
    kill_one(pid);
    CHECK(wait_for([&] { return get(proxy.port(), "/pid").status == 200; }));
    CHECK(wait_for(
        [&] { return children_in_group(static_cast<pid_t>(pid)).empty(); }));
    proxy.signal(SIGTERM);
    CHECK(proxy.wait() == 0);
  }
  CHECK(proxy.nothing_left());
}
