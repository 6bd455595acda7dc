// Which upstream connections are used again, and for whom.

#include "handlers.hpp"

#include <doctest/doctest.h>

#include <future>

using namespace support;

TEST_CASE("reuse: an idle upstream connection serves the next request") {
  Stage stage(telling());
  for (int i = 0; i < 10; ++i) {
    RawClient client(stage.port());
    CHECK(client.get().status == 200);
    // It is released after the response, which the next client may not await.
    CHECK(wait_for([&] { return stage.proxy.status().in_flight == 0; }));
  }
  CHECK(connections_used(stage) == 1);
}

TEST_CASE("reuse: a connection that the target closed is not used again") {
  Stage stage([](TargetConnection &c) {
    if (c.read_head().empty()) { return; }
    c.send(
        "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok");
    c.read_head(); // it leaves the close to us
    c.send("HTTP/1.1 500 Used again\r\nContent-Length: 0\r\n\r\n");
  });
  RawClient client(stage.port());
  for (int i = 0; i < 5; ++i) {
    CHECK(client.get().status == 200);
  }
  CHECK(connections_used(stage) == 5);
}

TEST_CASE("reuse: a target that closes unannounced after each response") {
  Stage stage(playing({sending_and_closing(ok())}));
  RawClient client(stage.port());
  for (int i = 0; i < 50; ++i) {
    CHECK(client.get().status == 200);
  }
}

TEST_CASE("reuse: unsolicited bytes are nobody's response") {
  const std::string poison =
      "HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison";
  SUBCASE("directly after a response") {
    Stage stage(answering(ok("good") + poison));
    RawClient client(stage.port());
    for (int i = 0; i < 5; ++i) {
      CHECK(client.get().body == "good");
    }
    CHECK(connections_used(stage) == 5); // it cannot be trusted any more
  }
  SUBCASE("after a response to HEAD, as its body") {
    Stage stage(answering(ok(poison)));
    RawClient client(stage.port());
    for (int i = 0; i < 5; ++i) {
      CHECK(client.exchange("HEAD / HTTP/1.1\r\nHost: test\r\n\r\n").status ==
            200);
    }
    CHECK(client.get().body == poison);
    CHECK(connections_used(stage) == 6);
  }
  SUBCASE("later, on an idle connection") {
    Gate answered, poisoned;
    std::atomic<bool> first{true};
    Stage stage([&](TargetConnection &c) {
      for (auto head = c.read_head(); !head.empty(); head = c.read_head()) {
        c.send(ok("good"));
        if (first.exchange(false)) {
          answered.wait();
          c.send(poison);
          poisoned.open();
        }
      }
    });
    RawClient client(stage.port());
    CHECK(client.get().body == "good");
    answered.open();
    poisoned.wait();
    CHECK(client.get().body == "good");
    CHECK(client.post("/", "x").body == "good");
  }
}

TEST_CASE("reuse: no client gets another client's response") {
  Stage stage(telling());
  const auto talk = [&](int client) {
    RawClient c(stage.port());
    for (int i = 0; i < 100; ++i) {
      const auto target =
          "/" + std::to_string(client) + "/" + std::to_string(i);
      const auto body = i % 2 ? std::string(static_cast<std::size_t>(i) * 37,
                                            static_cast<char>('a' + client))
                              : "";
      const auto response = i % 2 ? c.post(target, body) : c.get(target);
      if (response.body != target + "|" + body) { return false; }
    }
    return true;
  };
  std::vector<std::future<bool>> clients;
  for (int i = 0; i < 16; ++i) {
    clients.push_back(std::async(std::launch::async, talk, i));
  }
  for (auto &client : clients) {
    CHECK(client.get());
  }
}

TEST_CASE("reuse: a target that serves one connection at a time") {
  std::mutex busy;
  Stage stage([&](TargetConnection &c) {
    const std::lock_guard<std::mutex> lock(busy);
    answering(ok())(c);
  });
  // Idle connections must not block it for as long as their idle timeout.
  const Milliseconds less_than_that(10000);
  std::list<RawClient> clients;
  for (int i = 0; i < 5; ++i) {
    clients.emplace_back(stage.port());
    clients.back().send(plain);
    CHECK(clients.back().read_response(false, less_than_that).status == 200);
  }
}
