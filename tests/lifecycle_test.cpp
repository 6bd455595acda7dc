// The lives of connections: who keeps them, who closes them, and when.

#include "support.hpp"

#include <doctest/doctest.h>

#include <future>
#include <set>

using namespace support;
using namespace std::string_literals;

namespace {

const std::string plain = "GET / HTTP/1.1\r\nHost: test\r\n\r\n";
const std::string post_head =
    "POST / HTTP/1.1\r\nHost: test\r\nContent-Length: 4\r\n\r\n";

// Answers with the request's target and body.
ScriptedTarget::Handler telling() {
  return answering_with([](const std::string &head, const std::string &body) {
    const auto begin = head.find(' ') + 1;
    return ok(head.substr(begin, head.find(' ', begin) - begin) + "|" + body);
  });
}

// Answers the nth request that it gets, on whatever connection, as the nth of
// `scripts` says; the last one is for all further ones.
using Script = std::function<void(TargetConnection &)>;
ScriptedTarget::Handler playing(std::vector<Script> scripts) {
  auto next = std::make_shared<std::atomic<std::size_t>>(0);
  return [next, scripts = std::move(scripts)](TargetConnection &c) {
    for (auto head = c.read_head(); !head.empty(); head = c.read_head()) {
      c.read_body(head);
      const auto n = std::min(next->fetch_add(1), scripts.size() - 1);
      scripts[n](c);
      if (c.fd() < 0) { return; }
    }
  };
}
Script sending(std::string text) {
  return [text = std::move(text)](TargetConnection &c) { c.send(text); };
}
Script sending_and_closing(std::string text) {
  return [text = std::move(text)](TargetConnection &c) {
    c.send(text);
    c.close();
  };
}
Script sending_and_resetting(std::string text) {
  return [text = std::move(text)](TargetConnection &c) {
    c.send(text);
    c.reset();
  };
}

// On how many connections the target got its requests.
std::size_t connections_used(const Stage &stage) {
  std::set<std::size_t> numbers;
  for (const auto &request : stage.target.requests()) {
    numbers.insert(request.connection);
  }
  return numbers.size();
}

// What is left of an answer whose target went away in the middle of it.
struct Remains {
  std::string text;
  bool reset;
};
Remains remains(int port, const std::string &request) {
  RawClient client(port);
  client.send(request);
  auto text = client.read_to_end();
  return {text, client.was_reset()};
}

} // namespace

// ---- the client's connection -----------------------------------------------

TEST_CASE("pipelined requests are answered in their order") {
  Stage stage(telling());
  std::string all;
  for (int i = 0; i < 200; ++i) {
    const auto n = std::to_string(i);
    if (i % 4 == 0) {
      all += "GET /" + n + " HTTP/1.1\r\nHost: test\r\n\r\n";
    } else if (i % 4 == 1) {
      all += "POST /" + n +
             " HTTP/1.1\r\nHost: test\r\nContent-Length: 6\r\n\r\n" + "GET /\r";
    } else if (i % 4 == 2) {
      all += "PUT /" + n +
             " HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: "
             "chunked\r\n\r\n3\r\nGET\r\n0\r\nT: 1\r\n\r\n";
    } else {
      all += "HEAD /" + n + " HTTP/1.1\r\nHost: test\r\n\r\n";
    }
  }
  const auto check = [&](RawClient &client) {
    const char *bodies[] = {"", "GET /\r", "3\r\nGET\r\n0\r\nT: 1\r\n\r\n", ""};
    for (int i = 0; i < 200; ++i) {
      CAPTURE(i);
      const auto response = client.read_response(i % 4 == 3);
      CHECK(response.status == 200);
      CHECK(response.body ==
            (i % 4 == 3 ? "" : "/" + std::to_string(i) + "|" + bodies[i % 4]));
    }
  };
  SUBCASE("in one piece") {
    RawClient client(stage.port());
    client.send(all);
    check(client);
  }
  SUBCASE("in pieces that end anywhere") {
    RawClient client(stage.port());
    const auto sender = std::async(std::launch::async, [&] {
      std::size_t size = 1;
      for (std::string_view rest = all; !rest.empty();) {
        const auto piece = rest.substr(0, size);
        client.send(piece);
        rest.remove_prefix(piece.size());
        size = size % 97 + 1;
      }
    });
    RawClient &reader = client;
    check(reader);
    sender.wait();
  }
}

TEST_CASE("what follows a request that closes is not looked at") {
  Stage stage(telling());
  RawClient client(stage.port());
  client.send("GET /1 HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n"
              "GET /2 HTTP/1.1\r\nHost: test\r\n\r\n");
  const auto response = client.read_response();
  CHECK(response.body == "/1|");
  CHECK(response.header("Connection") == "close");
  CHECK(client.at_end());
  CHECK(stage.target.requests().size() == 1);
}

TEST_CASE("a connection outlives any answer that says where it ends") {
  Stage stage(dictated());
  RawClient client(stage.port());
  for (const std::string answer :
       {"HTTP/1.1 404 Not Found\r\nContent-Length: 4\r\n\r\nnope",
        "HTTP/1.1 500 Oh\r\nContent-Length: 0\r\n\r\n",
        "HTTP/1.1 400 Bad\r\nContent-Length: 3\r\n\r\nbad",
        "HTTP/1.1 413 Large\r\nContent-Length: 0\r\n\r\n",
        "HTTP/1.1 204 None\r\n\r\n", "HTTP/1.1 304 Same\r\n\r\n",
        "HTTP/1.1 304 Same\r\nContent-Length: 9\r\n\r\n",
        "HTTP/1.1 502 Mine\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nT: "
        "1\r\n\r\n",
        "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 1\r\n\r\nx",
        "HTTP/1.0 200 OK\r\nContent-Length: 1\r\n\r\nx"}) {
    CAPTURE(answer);
    const auto response = client.exchange(dictate(answer));
    CHECK(response.status == std::atoi(answer.c_str() + 9));
    CHECK(response.count("Connection") == 0);
    CHECK(client.exchange(dictate(ok("still here"))).body == "still here");
  }
}

TEST_CASE("an HTTP/1.0 client's connection") {
  Stage stage(dictated());
  const auto request = [](const std::string &lines, const std::string &answer) {
    return "POST / HTTP/1.0\r\n" + lines +
           "Content-Length: " + std::to_string(answer.size()) + "\r\n\r\n" +
           answer;
  };
  SUBCASE("is closed") {
    RawClient client(stage.port());
    const auto response = client.exchange(request("", ok()));
    CHECK(response.head ==
          "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: "
          "close\r\n\r\n");
    CHECK(response.body == "ok");
    CHECK(client.at_end());
    CHECK(stage.last().head.find("POST / HTTP/1.0\r\n") == 0);
  }
  SUBCASE("is kept if it asks for that") {
    RawClient client(stage.port());
    for (int i = 0; i < 3; ++i) {
      const auto response =
          client.exchange(request("connection: Keep-Alive\r\n", ok()));
      CHECK(response.head == "HTTP/1.1 200 OK\r\nContent-Length: "
                             "2\r\nConnection: keep-alive\r\n\r\n");
      CHECK(response.body == "ok");
    }
  }
  SUBCASE("gets no interim answers") {
    RawClient client(stage.port());
    const auto response = client.exchange(
        request("", "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early "
                    "Hints\r\nLink: </x>\r\n\r\n" +
                        ok()));
    CHECK(response.status == 200);
    CHECK(response.body == "ok");
  }
}

TEST_CASE("a target of HTTP/1.0") {
  SUBCASE("with a length, the client's connection is kept") {
    Stage stage(playing({sending_and_closing(
        "HTTP/1.0 200 OK\r\nContent-Length: 2\r\nServer: x\r\n\r\nok")}));
    RawClient client(stage.port());
    for (int i = 0; i < 3; ++i) {
      const auto response = client.get();
      CHECK(response.head ==
            "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nServer: x\r\n\r\n");
      CHECK(response.body == "ok");
    }
  }
  SUBCASE("that keeps its connection is used again") {
    Stage stage(answering("HTTP/1.0 200 OK\r\nConnection: keep-alive\r\n"
                          "Content-Length: 2\r\n\r\nok"));
    RawClient client(stage.port());
    for (int i = 0; i < 3; ++i) {
      CHECK(client.get().body == "ok");
    }
    CHECK(connections_used(stage) == 1);
  }
  SUBCASE("without a length, it ends for both") {
    Stage stage(playing({sending_and_closing("HTTP/1.0 200 OK\r\n\r\nok")}));
    RawClient client(stage.port());
    const auto response = client.get();
    CHECK(response.head == "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n");
    CHECK(response.body == "ok");
    CHECK(response.complete);
  }
}

TEST_CASE("empty lines before a request are skipped") { // RFC 9112, 2.2
  Stage stage(telling());
  RawClient client(stage.port());
  client.send("\r\nGET /1 HTTP/1.1\r\nHost: test\r\n\r\n\r\n\r\n"
              "GET /2 HTTP/1.1\r\nHost: test\r\n\r\n");
  CHECK(client.read_response().body == "/1|");
  CHECK(client.read_response().body == "/2|");
}

TEST_CASE("heads that come byte by byte") {
  const std::string answer = "HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"
                             "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
  Stage stage([&](TargetConnection &c) {
    while (!c.read_head().empty()) {
      for (const char byte : answer) {
        c.send({&byte, 1});
      }
    }
  });
  const std::string request =
      "GET /a%20b HTTP/1.1\r\nHost: test\r\nCookie: a=b\r\n\r\n";
  RawClient client(stage.port());
  for (int i = 0; i < 3; ++i) {
    for (const char byte : request) {
      client.send({&byte, 1});
    }
    CHECK(client.read_response().head ==
          "HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n");
    CHECK(client.read_response().body == "ok");
    CHECK(without_forwarded(stage.last().head) == request);
  }
}

TEST_CASE("a client that half-closes behind its request is answered") {
  // Only an answer that comes at once is certain to find it: a client that has
  // ended counts as gone. So one of many is enough.
  Stage stage(answering(ok()));
  CHECK(wait_for([&] {
    RawClient client(stage.port());
    client.send(plain);
    client.shutdown_write();
    const auto text = client.read_to_end();
    return text.find("\r\n\r\nok") != std::string::npos;
  }));
}

TEST_CASE("urgent data is no end of the data") {
  // It arrives as one with what is before and behind it, where a recv(2) stops
  // in between.
  ServeProcess proxy(serve_fake());
  CHECK(get(proxy.port(), "/pid").status == 200);
  proxy.signal(SIGSTOP);
  RawClient client(proxy.port());
  client.send("GET /pid HTTP/1.1\r\nHo");
  CHECK(::send(client.fd(), "!", 1, MSG_OOB) == 1);
  client.send("st: test\r\n\r\n");
  proxy.signal(SIGCONT);
  CHECK(client.read_response().status == 200);
}

// ---- interim answers -------------------------------------------------------

TEST_CASE("Expect: 100-continue is between client and target") {
  const std::string head = "POST / HTTP/1.1\r\nHost: test\r\nExpect: "
                           "100-continue\r\nContent-Length: 4\r\n\r\n";
  SUBCASE("which asks for the body") {
    Stage stage([](TargetConnection &c) {
      for (auto got = c.read_head(); !got.empty(); got = c.read_head()) {
        c.send("HTTP/1.1 100 Continue\r\nX: 1\r\n\r\n");
        c.send(ok(c.read_body(got)));
      }
    });
    RawClient client(stage.port());
    for (std::size_t i = 0; i < 2; ++i) {
      client.send(head);
      CHECK(client.read_response().head ==
            "HTTP/1.1 100 Continue\r\nX: 1\r\n\r\n");
      CHECK(without_forwarded(stage.target.request(i).head) == head);
      client.send("body");
      CHECK(client.read_response().body == "body");
    }
  }
  SUBCASE("which asks and answers in one piece") {
    Stage stage(playing({sending("HTTP/1.1 100 Continue\r\n\r\n" + ok())}));
    RawClient client(stage.port());
    client.send(head + "body");
    CHECK(client.read_response().status == 100);
    CHECK(client.read_response().status == 200);
  }
  SUBCASE("which answers without the body") {
    for (const std::string status : {"417 No", "401 Who", "200 OK"}) {
      CAPTURE(status);
      Stage stage([&](TargetConnection &c) {
        c.read_head();
        c.send("HTTP/1.1 " + status + "\r\nContent-Length: 2\r\n\r\nno");
        c.read_to_end();
      });
      RawClient client(stage.port());
      client.send(head);
      const auto response = client.read_response();
      CHECK(response.status == std::atoi(status.c_str()));
      CHECK(response.body == "no");
      // Nobody can know whether the client will still send the body.
      CHECK(response.header("Connection") == "close");
      CHECK(client.at_end());
    }
  }
  SUBCASE("which does not answer it: the body may come anyway") {
    Stage stage(telling());
    RawClient client(stage.port());
    client.send(head);
    stage.target.request();
    client.send("body");
    CHECK(client.read_response().body == "/|body");
  }
}

TEST_CASE("interim answers are passed on, any number of them") {
  const std::string hints = "HTTP/1.1 103 Early Hints\r\nLink: </a%20b>; "
                            "rel=preload\r\nLink: </c>\r\n\r\n";
  std::string all;
  for (int i = 0; i < 20; ++i) {
    all += hints + "HTTP/1.1 102 Processing\r\n\r\n";
  }
  Stage stage(playing({sending(all + ok())}));
  RawClient client(stage.port());
  for (int round = 0; round < 2; ++round) {
    client.send(plain);
    for (int i = 0; i < 20; ++i) {
      CHECK(client.read_response().head == hints);
      CHECK(client.read_response().head == "HTTP/1.1 102 Processing\r\n\r\n");
    }
    CHECK(client.read_response().body == "ok");
  }
}

TEST_CASE("an interim answer has no body, whatever it says") {
  Stage stage(playing({sending("HTTP/1.1 103 Early Hints\r\nContent-Length: "
                               "5\r\nA: 1\r\n\r\n" +
                               ok())}));
  RawClient client(stage.port());
  client.send(plain);
  CHECK(client.read_response().head ==
        "HTTP/1.1 103 Early Hints\r\nA: 1\r\n\r\n");
  CHECK(client.read_response().body == "ok");
}

// ---- early answers ---------------------------------------------------------

TEST_CASE("a 413 while the client still sends 20 MB reaches it whole") {
  // As much as the proxy's kernel takes at once: a target that closes with
  // bytes unread resets, and what it had not sent by then is gone for any
  // client.
  const std::string body(10000, 'l');
  const std::string answer = "HTTP/1.1 413 Too Large\r\nContent-Length: " +
                             std::to_string(body.size()) + "\r\n\r\n" + body;
  const std::size_t large = 20u << 20;
  const struct {
    std::string name;
    Script end;
  } cases[] = {
      {"and reads on", [](TargetConnection &c) { c.read_to_end(); }},
      {"and closes", [](TargetConnection &c) { c.close(); }},
      {"and half-closes",
       [](TargetConnection &c) {
         c.shutdown_write();
         c.read_to_end();
       }},
      {"and never reads",
       [](TargetConnection &c) {
         // Until nobody is left to send: only then the answer was not lost.
         pollfd p = {c.fd(), POLLRDHUP, 0};
         poll(&p, 1, static_cast<int>(patience.count()));
       }},
  };
  for (const auto &c : cases) {
    CAPTURE(c.name);
    for (const bool chunked : {false, true}) {
      CAPTURE(chunked);
      Stage stage([&](TargetConnection &connection) {
        if (connection.read_head().empty()) { return; }
        connection.send(answer);
        c.end(connection);
      });
      RawClient client(stage.port());
      client.send("POST / HTTP/1.1\r\nHost: test\r\n" +
                  (chunked ? "Transfer-Encoding: chunked\r\n\r\n1400000\r\n"s
                           : "Content-Length: 20971520\r\n\r\n"s));
      auto sender = std::async(std::launch::async,
                               [&] { return client.send_generated(large); });
      const auto response = client.read_response();
      CHECK(response.status == 413);
      CHECK((response.body == body));
      CHECK(response.complete);
      CHECK(response.header("Connection") == "close");
      CHECK(sender.get()); // all was taken: else a client might never read it
    }
  }
}

TEST_CASE("an answer that ends before its request is whole") {
  Stage stage([](TargetConnection &c) {
    if (c.read_head().empty()) { return; }
    c.read_exact(2);
    c.send(ok("early"));
    c.read_to_end();
  });
  RawClient client(stage.port());
  client.send(post_head + "bo");
  const auto response = client.read_response();
  CHECK(response.head ==
        "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\n");
  CHECK(response.body == "early");
  client.send("dyGET /smuggled HTTP/1.1\r\nHost: test\r\n\r\n");
  CHECK(client.read_to_end() == "");
  CHECK(stage.target.requests().size() == 1);
}

// ---- the target's connection -----------------------------------------------

TEST_CASE("the target's connection is kept and used again") {
  Stage stage(telling());
  for (int i = 0; i < 10; ++i) {
    RawClient client(stage.port());
    CHECK(client.get().status == 200);
    CHECK(client.post("/", "x").body == "/|x");
    // It is given back behind the answer, which another client may not await.
    CHECK(wait_for([&] { return stage.proxy.status().in_flight == 0; }));
  }
  CHECK(connections_used(stage) == 1);
}

TEST_CASE("a connection that the target closes is not used again") {
  Stage stage([](TargetConnection &c) {
    if (c.read_head().empty()) { return; }
    c.send(
        "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok");
    c.read_head(); // it does not close by itself
    c.send("HTTP/1.1 500 Used again\r\nContent-Length: 0\r\n\r\n");
  });
  RawClient client(stage.port());
  for (int i = 0; i < 5; ++i) {
    CHECK(client.get().status == 200);
  }
  CHECK(connections_used(stage) == 5);
}

TEST_CASE("a target that closes after every answer, unannounced") {
  Stage stage(playing({sending_and_closing(ok())}));
  RawClient client(stage.port());
  for (int i = 0; i < 50; ++i) {
    CHECK(client.get().status == 200);
  }
}

TEST_CASE("a kept connection that has gone stale is not noticed") {
  // Each connection answers once, and ends when it is used again: the close
  // crosses the request, which has arrived.
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

TEST_CASE("what cannot be sent again is never sent twice") {
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
    // The target answers on a new connection and fails on a used one.
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

TEST_CASE("what cannot be sent again does not ride on an old connection") {
  Stage stage(telling());
  CHECK(get(stage.port()).status == 200);
  const auto kept = Clock::now();
  wait_for([&] { return Clock::now() > kept + Milliseconds(1100); });
  CHECK(RawClient(stage.port()).post("/", "x").status == 200);
  CHECK(connections_used(stage) == 2);
}

TEST_CASE("what a target sends unasked is nobody's answer") {
  const std::string poison =
      "HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison";
  SUBCASE("right behind an answer") {
    Stage stage(answering(ok("good") + poison));
    RawClient client(stage.port());
    for (int i = 0; i < 5; ++i) {
      CHECK(client.get().body == "good");
    }
    CHECK(connections_used(stage) == 5); // who knows what else it would send
  }
  SUBCASE("behind an answer to HEAD, as its body") {
    Stage stage(answering(ok(poison)));
    RawClient client(stage.port());
    for (int i = 0; i < 5; ++i) {
      CHECK(client.exchange("HEAD / HTTP/1.1\r\nHost: test\r\n\r\n").status ==
            200);
    }
    CHECK(client.get().body == poison);
    CHECK(connections_used(stage) == 6);
  }
  SUBCASE("later, while nobody asks") {
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

TEST_CASE("no client gets another one's answer") {
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

// ---- a target that goes away -----------------------------------------------

TEST_CASE("a target that goes before its answer") {
  for (const auto &end : {sending_and_closing(""), sending_and_resetting("")}) {
    { // is asked again what can be asked again
      Stage stage(playing({end, sending(ok("again"))}));
      CHECK(get(stage.port()).body == "again");
      const auto requests = stage.target.requests();
      REQUIRE(requests.size() == 2);
      CHECK(requests[0].head == requests[1].head);
    }
    { // and nothing else
      Stage stage(playing({end, sending(ok("next"))}));
      RawClient client(stage.port());
      const auto response = client.exchange(post_head + "body");
      CHECK(response.status == 502);
      CHECK(response.body.find("warmproxy: ") == 0);
      CHECK(stage.target.requests().size() == 1);
      CHECK(get(stage.port()).body == "next");
    }
    { // and not for ever
      Stage stage(playing({end}));
      CHECK(get(stage.port()).status == 502);
    }
  }
}

TEST_CASE("a target that goes within its answer's head") {
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

TEST_CASE("a target that goes behind an interim answer") {
  Stage stage(
      playing({sending_and_closing("HTTP/1.1 103 Early Hints\r\n\r\n")}));
  RawClient client(stage.port());
  client.send(plain);
  CHECK(client.read_response().status == 103);
  CHECK(client.read_response().status == 502);
}

// The client must be able to see that something is missing.
TEST_CASE("a target that goes within its answer's body") {
  const struct {
    std::string name;
    std::string sent;
  } cases[] = {
      {"before any of it", "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n"},
      {"of a length", "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\npart"},
      {"before any chunk",
       "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"},
      {"in a chunk's size",
       "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4"},
      {"in a chunk",
       "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\npart"},
      {"behind a chunk",
       "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\npart\r\n"},
      {"behind the last chunk", "HTTP/1.1 200 OK\r\nTransfer-Encoding: "
                                "chunked\r\n\r\n4\r\npart\r\n0\r\n"},
      {"in the trailers", "HTTP/1.1 200 OK\r\nTransfer-Encoding: "
                          "chunked\r\n\r\n4\r\npart\r\n0\r\nT: 1\r\n"},
  };
  for (const auto &c : cases) {
    CAPTURE(c.name);
    for (const auto &end :
         {sending_and_closing(c.sent), sending_and_resetting(c.sent)}) {
      Stage stage(playing({end}));
      RawClient client(stage.port());
      client.send(plain);
      const auto response = client.read_response();
      CHECK(!response.complete);
      CHECK(stage.target.requests().size() == 1);

      // Nothing frames it for this one, so only a reset can tell.
      if (c.sent.find("chunked") != std::string::npos) {
        const auto old = remains(stage.port(), "GET / HTTP/1.0\r\n\r\n");
        CHECK(old.reset);
      }
    }
  }
}

TEST_CASE("a reset in an answer that ends with its connection is no end") {
  Stage stage(playing({sending_and_resetting("HTTP/1.1 200 OK\r\n\r\npart")}));
  CHECK(remains(stage.port(), plain).reset);
}

// ---- a client that goes away -----------------------------------------------

TEST_CASE("the target learns at once that a client has gone") {
  const std::string chunked =
      "POST / HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n";
  const struct {
    std::string when;
    std::string request, answer;
  } moments[] = {
      {"before the answer", plain, ""},
      {"after its body", post_head + "body", ""},
      {"before its body", post_head, ""},
      {"within its body", post_head + "bo", ""},
      {"within a chunk", chunked + "4\r\nbo", ""},
      {"between chunks", chunked + "4\r\nbody\r\n", ""},
      {"behind a pipelined one", plain + plain, ""},
      {"within the answer", plain,
       "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\npart"},
      {"within a chunked answer", plain,
       "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\npart\r\n"},
      {"within an answer without an end", plain, "HTTP/1.1 200 OK\r\n\r\npart"},
      {"within both", post_head + "bo",
       "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\npart"},
  };
  const struct {
    std::string name;
    void (*leave)(RawClient &);
  } ways[] = {
      {"closes", [](RawClient &c) { c.close(); }},
      {"resets", [](RawClient &c) { c.reset(); }},
      {"half-closes", [](RawClient &c) { c.shutdown_write(); }},
  };
  for (const auto &moment : moments) {
    CAPTURE(moment.when);
    for (const auto &way : ways) {
      CAPTURE(way.name);
      Gate gone;
      Stage stage([&](TargetConnection &c) {
        if (c.read_head().empty()) { return; }
        c.send(moment.answer);
        c.read_to_end();
        gone.open();
      });
      RawClient client(stage.port());
      client.send(moment.request);
      stage.target.request();
      if (!moment.answer.empty()) { client.read_until("part"); }
      CHECK(stage.proxy.status().in_flight == 1);
      way.leave(client);
      gone.wait();
      CHECK(wait_for([&] { return stage.proxy.status().in_flight == 0; }));
    }
  }
}

TEST_CASE("a target that sends is told, too, that the client has gone") {
  Gate gone;
  Stage stage([&](TargetConnection &c) {
    if (c.read_head().empty()) { return; }
    c.send("HTTP/1.1 200 OK\r\n\r\n");
    while (c.send(std::string(65536, 'x'))) {}
    gone.open();
  });
  RawClient client(stage.port());
  client.send(plain);
  client.read_exact(1 << 20);
  client.close();
  gone.wait();
  CHECK(wait_for([&] { return stage.proxy.status().in_flight == 0; }));
}

TEST_CASE("a client that leaves in a body leaves no half request behind") {
  Stage stage([](TargetConnection &c) {
    for (auto head = c.read_head(); !head.empty(); head = c.read_head()) {
      c.read_body(head);
      c.send(ok());
    }
  });
  {
    RawClient client(stage.port());
    client.send(post_head + "bo");
    stage.target.request();
  }
  CHECK(wait_for([&] { return stage.proxy.status().in_flight == 0; }));
  CHECK(get(stage.port()).status == 200);
  const auto requests = stage.target.requests();
  CHECK(requests.size() == 2);
  CHECK(requests[0].connection != requests[1].connection);
}

TEST_CASE("a target that serves one connection at a time") {
  std::mutex busy;
  Stage stage([&](TargetConnection &c) {
    const std::lock_guard<std::mutex> lock(busy);
    answering(ok())(c);
  });
  // Ones that we keep must not be in the way, for as long as we would keep
  // them.
  const Milliseconds less_than_that(10000);
  std::list<RawClient> clients;
  for (int i = 0; i < 5; ++i) {
    clients.emplace_back(stage.port());
    clients.back().send(plain);
    CHECK(clients.back().read_response(false, less_than_that).status == 200);
  }
}
