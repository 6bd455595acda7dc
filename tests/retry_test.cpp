// Which requests are sent again, and how often.

#include "handlers.hpp"

#include <doctest/doctest.h>

using namespace support;
using namespace std::string_literals;

TEST_CASE("retry: safe requests survive a stale idle connection") {
  // Each connection serves one request and is closed during the next.
  for (const bool reset : {false, true}) {
    CAPTURE(reset);
    Stage stage([=](TargetConnection &c) {
      if (c.read_head().empty()) { return; }
      c.send(ok());
      if (c.read_head().empty()) { return; }
      reset ? c.reset() : c.close();
    });
    RawClient client(stage.port());
    for (const std::string method : {"GET", "HEAD", "OPTIONS"}) {
      for (int i = 0; i < 3; ++i) {
        CHECK(client.exchange(method + " / HTTP/1.1\r\nHost: test\r\n\r\n")
                  .status == 200);
      }
    }
  }
}

TEST_CASE("retry: an unsafe request is never sent twice") {
  Stage stage([](TargetConnection &c) {
    if (c.read_head().empty()) { return; }
    c.send(ok());
    c.read_head();
    c.close();
  });
  for (const auto &request :
       {post_head + "body", "DELETE /p HTTP/1.1\r\nHost: test\r\n\r\n"s,
        "PUT /p HTTP/1.1\r\nHost: test\r\nContent-Length: 0\r\n\r\n"s,
        "GET /p HTTP/1.1\r\nHost: test\r\nContent-Length: 4\r\n\r\nbody"s}) {
    CAPTURE(request);
    // The target responds on a new connection and fails on a used one.
    const auto before = stage.target.requests().size();
    CHECK(get(stage.port()).status == 200);
    const auto response = exchange(stage.port(), request);
    CHECK((response.status == 502 || response.status == 200));
    std::size_t arrived = 0;
    const auto requests = stage.target.requests();
    const auto line = request.substr(0, request.find(' ') + 1);
    for (auto i = before; i < requests.size(); ++i) {
      if (requests[i].head.find(line) == 0 &&
          requests[i].head.find(plain.substr(0, 6)) != 0) {
        ++arrived;
      }
    }
    CHECK(arrived <= 1);
  }
}

// The target has sent it to the idle connection (RFC 9110, section 15.5.9).
TEST_CASE("retry: a 408 on a reused connection is no response") {
  const std::string timeout =
      "HTTP/1.1 408 Request Timeout\r\nConnection: close\r\n";
  const auto after_one = [](const std::string &response) {
    return [=](TargetConnection &c) {
      if (c.read_head().empty() || !c.send(ok()) || c.read_head().empty()) {
        return;
      }
      c.send(response);
    };
  };
  SUBCASE("with or without a body") {
    for (const std::string rest : {"\r\n", "Content-Length: 4\r\n\r\nlate"}) {
      CAPTURE(rest);
      Stage stage(after_one(timeout + rest));
      RawClient client(stage.port());
      for (int i = 0; i < 3; ++i) {
        CHECK(client.get().body == "ok");
      }
      CHECK(stage.target.requests().size() == 5);
    }
  }
  SUBCASE("but one that leaves it open is") {
    Stage stage(after_one("HTTP/1.1 408 No\r\nContent-Length: 0\r\n\r\n"));
    RawClient client(stage.port());
    CHECK(client.get().status == 200);
    CHECK(client.get().status == 408);
  }
  // It is not sent again, and the target may mean it.
  SUBCASE("and so is one to a request that may have changed something") {
    Stage stage([](TargetConnection &c) {
      if (c.read_head().empty() || !c.send(ok()) || c.read_head().empty()) {
        return;
      }
      c.send("HTTP/1.1 408 Late\r\nConnection: close\r\n"
             "Content-Length: 0\r\n\r\n");
    });
    RawClient client(stage.port());
    // Once the target is known to keep idle connections.
    CHECK(wait_for([&] {
      const auto status = client.post("/", "").status;
      CHECK((status == 200 || status == 408));
      return status == 408;
    }));
  }
  SUBCASE("and so is one on a new connection") {
    Stage stage(answering(timeout + "Content-Length: 0\r\n\r\n"));
    CHECK(get(stage.port()).status == 408);
    CHECK(stage.target.requests().size() == 1);
  }
}

TEST_CASE(
    "retry: an unsafe request avoids connections idle for over a second") {
  Stage stage(telling());
  CHECK(get(stage.port()).status == 200);
  const auto kept = Clock::now();
  wait_for([&] { return Clock::now() > kept + Milliseconds(1100); });
  CHECK(RawClient(stage.port()).post("/", "x").status == 200);
  CHECK(connections_used(stage) == 2);
}

TEST_CASE("retry: a connection that ends without a response") {
  for (const auto &end : {sending_and_closing(""), sending_and_resetting("")}) {
    { // a safe request is repeated
      Stage stage(playing({end, sending(ok("again"))}));
      CHECK(get(stage.port()).body == "again");
      const auto requests = stage.target.requests();
      REQUIRE(requests.size() == 2);
      CHECK(requests[0].head == requests[1].head);
    }
    { // and no other
      Stage stage(playing({end, sending(ok("next"))}));
      RawClient client(stage.port());
      const auto response = client.exchange(post_head + "body");
      CHECK(response.status == 502);
      CHECK(response.body.find("warmproxy: ") == 0);
      CHECK(stage.target.requests().size() == 1);
      CHECK(get(stage.port()).body == "next");
    }
    { // once at most (RFC 9110, section 9.2.2)
      Stage stage(playing({end}));
      CHECK(get(stage.port()).status == 502);
      CHECK(stage.target.requests().size() == 2);
    }
  }
}

TEST_CASE("retry: a connection that ends within the response head") {
  for (const std::string head :
       {"H", "HTTP/1.1 200", "HTTP/1.1 200 OK\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r"}) {
    CAPTURE(head);
    for (const auto &end :
         {sending_and_closing(head), sending_and_resetting(head)}) {
      Stage stage(playing({end, sending(ok())}));
      RawClient client(stage.port());
      const auto response = client.exchange(post_head + "body");
      CHECK(response.status == 502);
      CHECK(response.complete);
      CHECK(stage.target.requests().size() == 1);
    }
  }
}

TEST_CASE("retry: a connection that ends after an interim response") {
  Stage stage(
      playing({sending_and_closing("HTTP/1.1 103 Early Hints\r\n\r\n")}));
  RawClient client(stage.port());
  client.send(plain);
  CHECK(client.read_response().status == 103);
  CHECK(client.read_response().status == 502);
}

TEST_CASE("retry: Content-Length: 0 is no body") {
  for (const std::string method : {"GET", "HEAD", "OPTIONS", "TRACE"}) {
    CAPTURE(method);
    Stage stage(playing({sending_and_closing(""), sending(ok(""))}));
    CHECK(exchange(stage.port(), method + " / HTTP/1.1\r\nHost: test\r\n"
                                          "Content-Length: 0\r\n\r\n")
              .status == 200);
    CHECK(stage.target.requests().size() == 2);
  }
}

TEST_CASE("retry: other methods are never repeated, with or without a body") {
  for (const std::string method : {"POST", "PUT", "DELETE", "PATCH", "get"}) {
    CAPTURE(method);
    Stage stage(playing({sending_and_closing(""), sending(ok())}));
    CHECK(exchange(stage.port(), method + " / HTTP/1.1\r\nHost: test\r\n\r\n")
              .status == 502);
    CHECK(stage.target.requests().size() == 1);
  }
}

TEST_CASE("retry: nothing is sent more than three times") {
  const std::size_t idle = 6;
  std::atomic<std::size_t> waiting{0};
  std::atomic<bool> dead{false};
  // Each connection serves one request and is closed during the next. In the
  // end new connections are closed as well.
  Stage stage([&](TargetConnection &c) {
    if (c.read_head().empty() || dead) { return; }
    ++waiting;
    if (!wait_for([&] { return waiting >= idle; })) { return; }
    c.send(ok());
    c.read_head();
  });
  std::list<RawClient> clients;
  for (std::size_t i = 0; i < idle; ++i) {
    clients.emplace_back(stage.port());
    clients.back().send(plain);
  }
  for (auto &client : clients) {
    CHECK(client.read_response().status == 200);
  }
  CHECK(wait_for([&] { return stage.proxy.status().in_flight == 0; }));
  SUBCASE("stale connections and a good target") {
    CHECK(clients.front().get("/again").status == 200);
  }
  SUBCASE("stale connections and a target that never responds") {
    dead = true;
    CHECK(clients.front().get("/again").status == 502);
  }
  std::size_t sent = 0;
  for (const auto &request : stage.target.requests()) {
    sent += request.head.find("GET /again ") == 0;
  }
  CHECK(sent <= 3);
}
