// 1xx responses and Expect: 100-continue.

#include "handlers.hpp"

#include <doctest/doctest.h>

using namespace support;

TEST_CASE(
    "interim responses: Expect: 100-continue is left to client and target") {
  const std::string head = "POST / HTTP/1.1\r\nHost: test\r\nExpect: "
                           "100-continue\r\nContent-Length: 4\r\n\r\n";
  SUBCASE("100, then the body") {
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
  SUBCASE("100 and the response in one piece") {
    Stage stage(playing({sending("HTTP/1.1 100 Continue\r\n\r\n" + ok())}));
    RawClient client(stage.port());
    client.send(head + "body");
    CHECK(client.read_response().status == 100);
    CHECK(client.read_response().status == 200);
  }
  SUBCASE("a response without the body") {
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
  SUBCASE("no 100: the body may come all the same") {
    Stage stage(telling());
    RawClient client(stage.port());
    client.send(head);
    stage.target.request();
    client.send("body");
    CHECK(client.read_response().body == "/|body");
  }
}

TEST_CASE("interim responses: any number is forwarded") {
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

// It is not malformed, and a client that has got one must not get it again.
TEST_CASE("interim responses: the target closes after one") {
  for (const std::string method : {"GET", "POST"}) {
    CAPTURE(method);
    Stage stage(
        playing({sending_and_closing("HTTP/1.1 103 Early Hints\r\n\r\n")}));
    RawClient client(stage.port());
    client.send(method + " / HTTP/1.1\r\nHost: test\r\n\r\n");
    CHECK(client.read_response().status == 103);
    const auto response = client.read_response();
    CHECK(response.status == 502);
    CHECK(response.body ==
          "warmproxy: the target closed the connection without "
          "a response\n");
    CHECK(stage.target.requests().size() == 1);
  }
}

TEST_CASE("interim responses: never have a body") {
  Stage stage(playing({sending("HTTP/1.1 103 Early Hints\r\nContent-Length: "
                               "5\r\nA: 1\r\n\r\n" +
                               ok())}));
  RawClient client(stage.port());
  client.send(plain);
  CHECK(client.read_response().head ==
        "HTTP/1.1 103 Early Hints\r\nA: 1\r\n\r\n");
  CHECK(client.read_response().body == "ok");
}
