// Which upstream connections are used again, and for whom.

#include "handlers.hpp"

#include <doctest/doctest.h>

#include <future>

using namespace support;

namespace {

// Blocks each thread that arrives until `count` have arrived.
class Meeting {
public:
  explicit Meeting(int count) : missing_(count) {}
  void arrive() {
    if (--missing_ == 0) { all_.open(); }
    all_.wait();
  }

private:
  std::atomic<int> missing_;
  Gate all_;
};

} // namespace

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

// A server of one connection at a time may be blocked on it.
TEST_CASE("reuse: after a stall, the next connection to be idle is closed") {
  Gate asked, stalled;
  std::atomic<bool> closed{false};
  Stage stage([&](TargetConnection &c) {
    const auto head = c.read_head();
    if (head.find("/busy") != std::string::npos) {
      asked.open();
      stalled.wait();
      c.send(ok("good"));
      closed = c.read_to_end() == "";
    } else if (head.find("/idle") != std::string::npos) {
      c.send(ok("good"));
      c.read_to_end(); // it is closed for the request that has stalled
      stalled.open();
    } else {
      c.read_to_end(); // no response
    }
  });
  RawClient busy(stage.port()), idle(stage.port());
  busy.send("GET /busy HTTP/1.1\r\nHost: test\r\n\r\n");
  asked.wait();
  CHECK(idle.get("/idle").body == "good");
  {
    RawClient client(stage.port());
    client.send(post_head + "body");
    stalled.wait();
  }
  CHECK(busy.read_response().body == "good");
  // Long before it would have been idle for too long.
  CHECK(wait_for([&] { return closed.load(); }, Milliseconds(10000)));
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
  int at_once = 1; // clients
  SUBCASE("clients one after the other") {}
  SUBCASE("two clients at once") { at_once = 2; }
  SUBCASE("four clients at once") { at_once = 4; }
  std::mutex busy;
  Stage stage([&](TargetConnection &c) {
    const std::lock_guard<std::mutex> lock(busy);
    for (auto head = c.read_head(); !head.empty(); head = c.read_head()) {
      if (at_once > 1) { poll(nullptr, 0, 300); } // the others have to wait
      c.send(ok());
    }
  });
  // Idle connections must not block it for as long as their idle timeout.
  const Milliseconds less_than_that(10000);
  std::list<RawClient> clients;
  for (int i = 0; i < 4; i += at_once) {
    for (int n = 0; n < at_once; ++n) {
      clients.emplace_back(stage.port());
      clients.back().send(plain);
    }
    for (auto c = std::prev(clients.end(), at_once); c != clients.end(); ++c) {
      CHECK(c->read_response(false, less_than_that).status == 200);
    }
  }
}

// A body sent behind the response to HEAD would become the next response.
TEST_CASE("reuse: a body sent late after a response to HEAD is nobody's") {
  const std::string poison =
      "HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison";
  Gate received, sent;
  Stage stage([&](TargetConnection &c) {
    for (auto head = c.read_head(); !head.empty(); head = c.read_head()) {
      if (head.find("HEAD ") == 0) {
        c.send("HTTP/1.1 200 OK\r\nContent-Length: 45\r\n\r\n");
        received.wait();
        c.send(poison);
        sent.open();
      } else {
        c.send(ok("good"));
      }
    }
  });
  RawClient client(stage.port());
  CHECK(client.exchange("HEAD / HTTP/1.1\r\nHost: test\r\n\r\n").status == 200);
  received.open();
  SUBCASE("another client") { CHECK(get(stage.port()).body == "good"); }
  SUBCASE("the same client") { CHECK(client.get().body == "good"); }
  sent.wait();
  CHECK(client.get().body == "good");
}

TEST_CASE("reuse: not after a response with a body that it must not have") {
  const struct {
    std::string name, response;
    bool reused;
  } cases[] = {
      {"a 204", "HTTP/1.1 204 None\r\n\r\n", true},
      {"a 204 with a length", "HTTP/1.1 204 None\r\nContent-Length: 5\r\n\r\n",
       false},
      {"a 204 with chunks",
       "HTTP/1.1 204 None\r\nTransfer-Encoding: chunked\r\n\r\n", false},
      {"a 304", "HTTP/1.1 304 Same\r\n\r\n", true},
      {"a 304 with a length", "HTTP/1.1 304 Same\r\nContent-Length: 5\r\n\r\n",
       false},
      {"a 304 with chunks",
       "HTTP/1.1 304 Same\r\nTransfer-Encoding: chunked\r\n\r\n", false},
      {"a repaired header line",
       "HTTP/1.1 200 OK\r\nX : 1\r\nContent-Length: 0\r\n\r\n", false},
      {"a repaired length", "HTTP/1.1 200 OK\r\nContent-Length: 2, 2\r\n\r\nok",
       false},
      {"repaired chunks",
       "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0 \r\n\r\n",
       false},
      {"a length beside chunks",
       "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 9\r\n"
       "\r\n0\r\n\r\n",
       false},
  };
  for (const auto &c : cases) {
    CAPTURE(c.name);
    Stage stage(answering(c.response));
    RawClient client(stage.port());
    for (int i = 0; i < 3; ++i) {
      CHECK(client.get().complete);
    }
    CHECK(connections_used(stage) == (c.reused ? 1 : 3));
  }
}

TEST_CASE("reuse: not after a 1xx that announced a body") {
  for (const bool announced : {false, true}) {
    CAPTURE(announced);
    const std::string length = announced ? "Content-Length: 5\r\n" : "";
    Stage stage(
        answering("HTTP/1.1 103 Early Hints\r\n" + length + "\r\n" + ok()));
    RawClient client(stage.port());
    for (int i = 0; i < 3; ++i) {
      client.send(plain);
      CHECK(client.read_response().status == 103);
      CHECK(client.read_response().body == "ok");
    }
    CHECK(connections_used(stage) == (announced ? 3 : 1));
  }
}

// As webdis does: its parser does not recover, and its connection stays open.
TEST_CASE("reuse: what a parser that is lost answers stays with its client") {
  Stage stage([](TargetConnection &c) {
    bool lost = false;
    for (auto head = c.read_head(); !head.empty(); head = c.read_head()) {
      lost |= head.find("FOO ") == 0;
      c.send(lost ? "HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n"
                  : ok());
    }
  });
  RawClient bad(stage.port()), good(stage.port());
  CHECK(good.get().status == 200);
  CHECK(bad.exchange("FOO / HTTP/1.1\r\nHost: test\r\n\r\n").status == 400);
  CHECK(good.get().status == 200);
  CHECK(bad.get().status == 400);
  CHECK(good.get().status == 200);
  CHECK(RawClient(stage.port()).get().status == 200);
}

TEST_CASE("reuse: not after an upgrade that was not granted") {
  Stage stage(telling());
  RawClient client(stage.port());
  CHECK(
      client.get("/", "Connection: Upgrade\r\nUpgrade: websocket\r\n").status ==
      200);
  CHECK(client.get().status == 200);
  CHECK(connections_used(stage) == 2);
  CHECK(client.get().status == 200);
  CHECK(connections_used(stage) == 2);
}

TEST_CASE("reuse: clients of HTTP/1.0 and 1.1 share connections") {
  Stage stage(telling());
  for (int i = 0; i < 5; ++i) {
    RawClient client(stage.port());
    CHECK(client.exchange("GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
              .status == 200);
    CHECK(exchange(stage.port(), "GET / HTTP/1.0\r\n\r\n").status == 200);
    CHECK(client.get().status == 200);
    CHECK(wait_for([&] { return stage.proxy.status().in_flight == 0; }));
  }
  CHECK(connections_used(stage) <= 4); // one for each event loop
}

// ---- private connections ---------------------------------------------------

// Many servers do not read the body of a request that they redirect or refuse,
// and take it for the next request.
TEST_CASE("reuse: an unread body is not another client's request") {
  const std::string hidden = "GET /hidden HTTP/1.1\r\nHost: test\r\n\r\n";
  const auto length =
      "Content-Length: " + std::to_string(hidden.size()) + "\r\n\r\n";
  const struct {
    std::string name, request;
  } cases[] = {
      {"a POST", "POST /form HTTP/1.1\r\nHost: test\r\n" + length + hidden},
      {"a GET", "GET /form HTTP/1.1\r\nHost: test\r\n" + length + hidden},
      {"a DELETE", "DELETE /form HTTP/1.1\r\nHost: test\r\n" + length + hidden},
      {"an HTTP/1.0 client",
       "POST /form HTTP/1.0\r\nConnection: keep-alive\r\n" + length + hidden},
      {"chunks", "POST /form HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: "
                 "chunked\r\n\r\n24\r\n" +
                     hidden + "\r\n0\r\n\r\n"},
  };
  for (const auto &c : cases) {
    CAPTURE(c.name);
    Stage stage([](TargetConnection &connection) {
      for (auto head = connection.read_head(); !head.empty();
           head = connection.read_head()) {
        const auto begin = head.find(" /") + 1;
        const auto path = head.substr(begin, head.find(' ', begin) - begin);
        if (path == "/form") {
          connection.send("HTTP/1.1 303 See Other\r\nLocation: /\r\n"
                          "Content-Length: 0\r\n\r\n");
        } else {
          connection.send(ok(path));
        }
      }
    });
    for (int i = 0; i < 10; ++i) {
      RawClient client(stage.port()), other(stage.port());
      CHECK(other.get("/before").body == "/before");
      CHECK(client.exchange(c.request).status == 303);
      CHECK(other.get("/other").body == "/other");
      CHECK(get(stage.port(), "/new").body == "/new");
    }
  }
}

TEST_CASE("reuse: a connection that carried a body stays with its client") {
  Stage stage(telling());
  auto client = std::make_unique<RawClient>(stage.port());
  CHECK(client->post("/", "x").status == 200);
  const auto own = stage.last().connection;
  CHECK(client->get().status == 200);
  CHECK(stage.last().connection == own);
  RawClient other(stage.port());
  CHECK(other.get().status == 200);
  CHECK(stage.last().connection != own);
  CHECK(client->get().status == 200);
  CHECK(stage.last().connection == own);
  // It is closed with the client's.
  CHECK(wait_for([&] { return stage.proxy.status().in_flight == 0; }));
  const auto open = stage.target.open();
  client.reset();
  CHECK(wait_for([&] { return stage.target.open() == open - 1; }));
  CHECK(other.get().status == 200);
  CHECK(stage.last().connection != own);
}

TEST_CASE(
    "reuse: behind a front, no connection that carried a body is reused") {
  Stage stage(telling(),
              [](warmproxy::Options &options) { options.trust_proxy = true; });
  RawClient client(stage.port());
  for (int i = 0; i < 3; ++i) {
    CHECK(client.post("/", "x").status == 200);
    const auto used = stage.last().connection;
    CHECK(client.get().status == 200);
    CHECK(stage.last().connection != used);
  }
}

namespace {

// Logs in the connection, as NTLM does: whoever sends a request on it is alice.
// "/public" is for everybody, once all are there.
ScriptedTarget::Handler logging_in(const std::string &scheme,
                                   bool closes = false,
                                   Meeting *visitors = nullptr) {
  return [=](TargetConnection &c) {
    bool alice = false;
    for (auto head = c.read_head(); !head.empty(); head = c.read_head()) {
      c.read_body(head);
      if (head.find("GET /public ") == 0) {
        visitors->arrive();
        c.send(ok("public"));
        continue;
      }
      if (!header_of(head, "Authorization").empty()) { alice = true; }
      const bool is_head = head.find("HEAD ") == 0;
      const std::string last = closes && alice ? "Connection: close\r\n" : "";
      const auto response =
          alice ? ok("alice", last)
                : "HTTP/1.1 401 No\r\nWWW-Authenticate: " + scheme +
                      "\r\nContent-Length: 0\r\n\r\n";
      c.send(is_head ? response.substr(0, response.find("\r\n\r\n") + 4)
                     : response);
    }
  };
}

} // namespace

TEST_CASE("reuse: a connection that NTLM or Negotiate logged in is private") {
  for (const std::string scheme : {"NTLM", "Negotiate", "negotiate"}) {
    CAPTURE(scheme);
    Stage stage(logging_in(scheme));
    RawClient client(stage.port());
    CHECK(client.get().status == 401);
    CHECK(client.get("/", "Authorization: " + scheme + " TlRMTVNTUAAB\r\n")
              .body == "alice");
    const auto own = stage.last().connection;
    for (int i = 0; i < 5; ++i) {
      CHECK(get(stage.port()).status == 401);
    }
    // Her own requests stay on it, without credentials and whatever they are.
    CHECK(client.get().body == "alice");
    CHECK(client.post("/", "x").body == "alice");
    CHECK(client.exchange("HEAD / HTTP/1.1\r\nHost: test\r\n\r\n").status ==
          200);
    CHECK(client.get().body == "alice");
    CHECK(stage.last().connection == own);
  }
}

// Visitors leave more upstream connections behind than are kept, and the oldest
// ones are closed.
TEST_CASE("reuse: a logged-in connection is not closed as a spare one") {
  constexpr int count = 40;
  Meeting meeting(count);
  Stage stage(logging_in("NTLM", false, &meeting));
  RawClient client(stage.port());
  CHECK(client.get("/", "Authorization: NTLM TlRMTVNTUAAB\r\n").body ==
        "alice");
  std::list<RawClient> visitors;
  for (int i = 0; i < count; ++i) {
    visitors.emplace_back(stage.port());
    visitors.back().send("GET /public HTTP/1.1\r\nHost: test\r\n\r\n");
  }
  for (auto &visitor : visitors) {
    CHECK(visitor.read_response().body == "public");
  }
  visitors.clear();
  CHECK(wait_for([&] { return stage.target.open() < count / 2; }));
  CHECK(client.get().body == "alice");
}

TEST_CASE("reuse: when a logged-in connection ends, the client's ends, too") {
  Stage stage(logging_in("NTLM", true));
  RawClient client(stage.port());
  const auto response = client.get("/", "Authorization: NTLM TlRMTVNTUAAB\r\n");
  CHECK(response.body == "alice");
  CHECK(response.header("Connection") == "close");
  CHECK(client.at_end());
}

// Or it would go on as nobody, without notice.
TEST_CASE("reuse: a client learns that its logged-in connection was closed") {
  Stage stage([](TargetConnection &c) {
    for (auto head = c.read_head(); !head.empty(); head = c.read_head()) {
      if (!header_of(head, "Authorization").empty()) {
        c.send(ok("alice"));
        return;
      }
      c.send(ok("nobody"));
    }
  });
  RawClient client(stage.port());
  const auto response = client.get("/", "Authorization: NTLM TlRMTVNTUAAB\r\n");
  CHECK(response.body == "alice");
  CHECK(response.header("Connection") == "");
  CHECK(wait_for([&] { return stage.target.open() == 0; }));
  const auto next = client.get();
  CHECK(next.body == "nobody");
  CHECK(next.header("Connection") == "close");
  CHECK(client.at_end());
}

// ---- requests that must not be sent twice ----------------------------------

namespace {

// Closes a connection unannounced 3 ms after its response to a POST, and leaves
// it open after a GET. Responds to no GET before `gets` of them have arrived.
ScriptedTarget::Handler closing_after_post(int gets = 1) {
  const auto meeting = std::make_shared<Meeting>(gets);
  return [meeting](TargetConnection &c) {
    for (auto head = c.read_head(); !head.empty(); head = c.read_head()) {
      c.read_body(head);
      const bool is_post = head.find("POST ") == 0;
      if (!is_post) { meeting->arrive(); }
      c.send(ok());
      if (!is_post) { continue; }
      poll(nullptr, 0, 3);
      return;
    }
  };
}

} // namespace

TEST_CASE("reuse: a target that closes 3 ms after each POST loses none") {
  Stage stage(closing_after_post());
  RawClient client(stage.port());
  for (int i = 0; i < 100; ++i) {
    const auto response = client.post("/", i % 2 ? "x" : "");
    CHECK(response.status == 200);
    if (i % 3 == 0) { poll(nullptr, 0, i % 7); }
  }
}

// Idle connections show that the target keeps them open. That does not count
// any more once it has closed another one early.
TEST_CASE("reuse: no POST is lost after an early close, whatever stays idle") {
  constexpr int count = 8;
  Stage stage(closing_after_post(count));
  std::list<RawClient> clients;
  for (int i = 0; i < count; ++i) {
    clients.emplace_back(stage.port());
    clients.back().send(plain);
  }
  for (auto &client : clients) {
    CHECK(client.read_response().status == 200);
  }
  RawClient client(stage.port());
  CHECK(client.post("/", "").status == 200);
  // The close is seen, and what stays idle is so for more than a second.
  wait_for([] { return false; }, Milliseconds(1300));
  for (int i = 0; i < 20; ++i) {
    CHECK(client.post("/", "x").status == 200);
  }
}

// The close was seen only when the request was already on its way.
TEST_CASE("reuse: no POST trusts a target that closed an idle connection") {
  std::atomic<bool> closes{false};
  Stage stage([&](TargetConnection &c) {
    for (auto head = c.read_head(); !head.empty(); head = c.read_head()) {
      if (closes.exchange(false)) { return; }
      c.send(ok());
    }
  });
  RawClient client(stage.port());
  std::size_t last = 0;
  const auto post_again = [&] {
    CHECK(client.post("/", "").status == 200);
    return std::exchange(last, stage.last().connection) ==
           stage.last().connection;
  };
  CHECK(wait_for(post_again)); // it has been seen to keep them
  closes = true;
  CHECK(client.get().status == 200);
  CHECK(stage.last().connection != last); // on a new one
  last = stage.last().connection;
  CHECK(!post_again());
}

TEST_CASE(
    "reuse: POSTs share connections once the target is known to keep them") {
  Stage stage(telling());
  RawClient client(stage.port());
  std::size_t before = 0;
  CHECK(wait_for([&] {
    CHECK(client.post("/", "").status == 200);
    const auto used = stage.last().connection;
    return std::exchange(before, used) == used;
  }));
}
