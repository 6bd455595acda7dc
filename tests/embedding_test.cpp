// A Proxy as a part of another program.

#include "figures.hpp"

using namespace support;

TEST_CASE("embedding: a Proxy listens once") {
  warmproxy::Proxy proxy(fake_target());
  const auto port = proxy.bind_to_any_port("127.0.0.1");
  REQUIRE(port > 0);
  std::thread thread([&] { CHECK(proxy.listen_after_bind()); });
  CHECK(get(port, "/pid").status == 200);
  CHECK(!proxy.listen_after_bind());
  CHECK(!proxy.listen("127.0.0.1", 0));
  CHECK(proxy.bind_to_any_port("127.0.0.1") == -1);
  CHECK(get(port, "/pid").status == 200);
  proxy.stop();
  thread.join();
  CHECK(!proxy.listen_after_bind());
  CHECK(!proxy.listen("127.0.0.1", 0));
}

TEST_CASE("embedding: stop() before listening") {
  warmproxy::Proxy proxy(fake_target());
  REQUIRE(proxy.bind_to_any_port("127.0.0.1") > 0);
  proxy.stop();
  proxy.listen_after_bind(); // returns
}

TEST_CASE("embedding: the destructor waits for listen_after_bind()") {
  for (int i = 0; i < 10; ++i) {
    std::atomic<bool> over{false};
    auto proxy = std::make_unique<warmproxy::Proxy>(fake_target());
    const auto port = proxy->bind_to_any_port("127.0.0.1");
    REQUIRE(port > 0);
    std::thread thread([&, raw = proxy.get()] {
      raw->listen_after_bind();
      over = true;
    });
    CHECK(get(port, "/pid").status == 200);
    const auto pid = static_cast<pid_t>(proxy->status().pid);
    proxy.reset();
    thread.join();
    CHECK(over);
    CHECK(children_in_group(pid).empty());
  }
}

// It inherits the listening socket, and the pipe by which the watchdog process
// notices our end.
TEST_CASE("embedding: a forked child keeps neither the port nor us") {
  auto proxy = std::make_unique<RunningProxy>(fake_target());
  CHECK(get(proxy->port(), "/pid").status == 200);
  const auto child = fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    for (;;) {
      pause();
    }
  }
  const auto pid = static_cast<pid_t>(proxy->status().pid);
  const auto port = proxy->port();
  proxy->stop();
  CHECK_THROWS_AS(connect_to("127.0.0.1", port), Error); // refused
  proxy.reset();
  CHECK(children_in_group(pid).empty());
  CHECK(kill(child, 0) == 0);
  kill_one(child);
  CHECK(waitpid(child, nullptr, 0) == child);
}

// The parent's threads and its target are not there.
TEST_CASE("embedding: a forked child does not listen, nor stop the parent's") {
  auto proxy = std::make_unique<warmproxy::Proxy>(fake_target());
  const auto port = proxy->bind_to_any_port("127.0.0.1");
  REQUIRE(port > 0);
  const auto in_child = [&](auto action) {
    const auto child = fork();
    if (child == 0) {
      alarm(10); // it must not wait
      _exit(action() ? 0 : 1);
    }
    int status = -1;
    waitpid(child, &status, 0);
    return status;
  };
  CHECK(in_child([&] { return !proxy->listen_after_bind(); }) == 0);
  std::thread thread([&, raw = proxy.get()] { raw->listen_after_bind(); });
  const auto served = get(port, "/pid");
  CHECK(served.status == 200);
  CHECK(in_child([&] { return proxy.reset(), true; }) == 0);
  CHECK(get(port, "/pid").body == served.body);
  proxy->stop();
  thread.join();
}

// A program that waits for signals has them blocked in its own threads.
TEST_CASE("embedding: its threads take no signal of the program's") {
  const auto child = fork();
  if (child == 0) {
    sigset_t signals;
    sigemptyset(&signals);
    sigaddset(&signals, SIGTERM);
    bool received = false;
    {
      warmproxy::Proxy proxy(fake_target());
      pthread_sigmask(SIG_BLOCK, &signals, nullptr);
      kill(getpid(), SIGTERM);
      const timespec patiently{10, 0};
      received = sigtimedwait(&signals, nullptr, &patiently) == SIGTERM;
    }
    _exit(received ? 0 : 1);
  }
  int status = -1;
  waitpid(child, &status, 0);
  CHECK(status == 0);
}

TEST_CASE("embedding: a log function that throws is survived") {
  auto options = fake_target();
  options.log = [](std::string_view) { throw std::runtime_error("no log"); };
  RunningProxy proxy(options);
  CHECK(get(proxy.port(), "/pid").status == 200);
  CHECK(get(proxy.port(), "/crash").status >= 502);
  CHECK(wait_for([&] { return get(proxy.port(), "/pid").status == 200; }));
  CHECK(proxy.stop());
}

TEST_CASE("embedding: milliseconds::max() means never") {
  auto options = fake_target();
  options.startup_timeout = Milliseconds::max();
  options.stop_timeout = Milliseconds::max();
  options.idle_stop = Milliseconds::max();
  options.waiting_page_after = Milliseconds::max();
  options.keep_alive_timeout = Milliseconds::max();
  RunningProxy proxy(options);
  RawClient client(proxy.port());
  CHECK(client.get("/pid", "Sec-Fetch-Dest: document\r\n").status == 200);
  CHECK(client.get("/pid").status == 200);
  CHECK(proxy.status().state == "up");
  CHECK(proxy.stop());
}
