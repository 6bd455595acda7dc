// What may be in progress when the proxy is stopped or killed.

#ifndef WARMPROXY_TESTS_IN_PROGRESS_HPP
#define WARMPROXY_TESTS_IN_PROGRESS_HPP

#include "figures.hpp"

namespace support {

// A value that finds all processes that have it in their environment.
inline std::string new_mark() {
  static std::atomic<int> count{0};
  return std::to_string(getpid()) + "-" + std::to_string(++count);
}

// build/warmproxy with tests/fake.cpp behind it, both marked.
class Marked : public ServeProcess {
public:
  explicit Marked(const std::vector<std::string> &args,
                  const Environment &more = {})
      : Marked(args, more, new_mark()) {}

  // All marked processes that still run: warmproxy, its watchdog process, the
  // target and what the target has started.
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

// Something that is in progress when the proxy is told to stop.
struct Activity {
  std::string name;
  std::vector<std::string> args; // of the fake
  std::string request;           // what the client sends
  std::string seen;              // what it awaits before the proxy is stopped
  std::function<void(RawClient &)> on; // how it ends well
};

inline std::vector<Activity> activities(const TemporaryDirectory &directory) {
  const auto gate = directory / "gate";
  const auto request = [](const std::string &line, const std::string &more) {
    return line + " HTTP/1.1\r\nHost: test\r\n" + more + "\r\n";
  };
  return {
      {"a start",
       {"--listen-after", "600000"},
       request("GET /pid", ""),
       "",
       [](RawClient &client) {
         const auto response = client.read_response();
         CHECK(response.status == 503);
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
       {"--polite"},
       request("GET /sse?n=3&gate=" + gate, ""),
       "data: 1\n\n",
       [](RawClient &client) { CHECK(client.read_until("0\r\n\r\n") != ""); }},
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
       {"--polite"},
       request("GET /ws", "Connection: Upgrade\r\nUpgrade: echo\r\n") + "one",
       "one",
       [](RawClient &client) {
         CHECK(client.read_exact(3) == "bye");
         client.shutdown_write();
       }},
  };
}

// Brings the activity as far as it gets.
inline void begin(const Activity &activity, const Marked &proxy,
                  RawClient &client) {
  client.send(activity.request);
  if (!activity.seen.empty()) {
    client.read_until(activity.seen);
  } else {
    // The target runs, beside warmproxy and the watchdog process.
    CHECK(wait_for([&] { return proxy.processes().size() > 2; }));
  }
}

} // namespace support

#endif
