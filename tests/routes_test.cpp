// Own routes and the pre-routing handler: the seam to cpp-httplib.

#include "support.hpp"

#include <doctest/doctest.h>

using namespace support;

namespace {

using httplib::Request;
using HandlerResponse = httplib::Server::HandlerResponse;

// A Proxy that is configured before it listens.
class Embedded {
public:
  template <typename Configure>
  Embedded(warmproxy::Options options, Configure configure)
      : proxy_(quiet(std::move(options))) {
    configure(proxy_);
    port_ = proxy_.bind_to_any_port("127.0.0.1");
    if (port_ <= 0) { throw Error("the proxy cannot bind"); }
    thread_ = std::thread([this] { proxy_.listen_after_bind(); });
  }
  ~Embedded() { stop(); }

  int port() const { return port_; }
  warmproxy::Proxy &proxy() { return proxy_; }
  warmproxy::Status status() const { return proxy_.status(); }
  void stop() {
    proxy_.stop();
    if (thread_.joinable()) { thread_.join(); }
  }

private:
  static warmproxy::Options quiet(warmproxy::Options options) {
    options.log = [](std::string_view) {};
    return options;
  }

  warmproxy::Proxy proxy_;
  int port_ = 0;
  std::thread thread_;
};

// Echoes what the handler is given.
void add_routes(warmproxy::Proxy &proxy) {
  auto &own = proxy.routes("/own");
  own.Get("/own/hello", [](const Request &, httplib::Response &res) {
    res.set_content("hello", "text/plain");
  });
  own.Get(
      R"(/own/number/(\d+))", [](const Request &req, httplib::Response &res) {
        res.set_content(req.matches[1].str() + "?" + req.get_param_value("q"),
                        "text/plain");
      });
  own.Post("/own/echo", [](const Request &req, httplib::Response &res) {
    res.set_content(req.body, "text/plain");
  });
  own.Post("/own/ignore", [](const Request &, httplib::Response &res) {
    res.set_content("ignored", "text/plain");
  });
  own.Get("/own/chunks", [](const Request &, httplib::Response &res) {
    res.set_chunked_content_provider(
        "text/plain", [](std::size_t offset, httplib::DataSink &sink) {
          if (offset >= 9) {
            sink.done();
          } else {
            sink.write("abc", 3);
          }
          return true;
        });
  });
  own.Get("/own/who", [](const Request &req, httplib::Response &res) {
    res.set_content(req.remote_addr + "|" +
                        req.get_header_value("X-Forwarded-For") + "|" +
                        req.get_header_value("X-Real-IP"),
                    "text/plain");
  });
  own.Get("/own/throw", [](const Request &, httplib::Response &) {
    throw std::runtime_error("thrown");
  });
}

warmproxy::Options cold_target() { return fake_target(); }

} // namespace

TEST_CASE("own routes: path, query and body, without starting the target") {
  Embedded proxy(cold_target(), add_routes);
  RawClient client(proxy.port());
  CHECK(client.get("/own/hello").body == "hello");
  CHECK(client.get("/own/number/42?q=a%20b").body == "42?a b");
  CHECK(client.post("/own/echo", "body").body == "body");
  CHECK(client
            .exchange("POST /own/echo HTTP/1.1\r\nHost: test\r\n"
                      "Transfer-Encoding: chunked\r\n\r\n"
                      "3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n")
            .body == "abcde");
  const auto chunks = client.get("/own/chunks");
  CHECK(chunks.body == "abcabcabc");
  CHECK(chunks.complete);
  CHECK(proxy.status().state == "cold");
  CHECK(proxy.status().requests == 0);
  CHECK(proxy.status().connections == 1); // all of them were on this one
}

TEST_CASE("own routes: multipart bodies") {
  Embedded proxy(cold_target(), add_routes);
  const std::string body = "--x\r\nContent-Disposition: form-data; name=\"f\"; "
                           "filename=\"a.txt\"\r\n\r\nfile\r\n--x--\r\n";
  RawClient client(proxy.port());
  const auto response = client.post(
      "/own/ignore", body, "Content-Type: multipart/form-data; boundary=x\r\n");
  CHECK(response.body == "ignored");
  CHECK(client.get("/own/hello").body == "hello");
}

TEST_CASE("own routes: a prefix matches on a segment boundary") {
  Embedded proxy(cold_target(), [](warmproxy::Proxy &p) {
    add_routes(p);
    p.routes("/own/deep")
        .Get("/own/deep/x", [](const Request &, httplib::Response &res) {
          res.set_content("deep", "text/plain");
        });
  });
  RawClient client(proxy.port());
  CHECK(client.get("/own/deep/x").body == "deep"); // the longest prefix wins
  CHECK(client.get("/own").status == 404);
  CHECK(RawClient(proxy.port()).get("/own/nothing").status == 404);
  CHECK(proxy.status().state == "cold");
  CHECK(RawClient(proxy.port()).get("/owner").status == 404); // the target's
  CHECK(proxy.status().state == "up");
}

TEST_CASE("own routes: the same prefix is the same server") {
  warmproxy::Proxy proxy(cold_target());
  CHECK(&proxy.routes("/own") == &proxy.routes("own/"));
  CHECK(&proxy.routes("/own") != &proxy.routes("/other"));
  CHECK_THROWS_AS(proxy.routes(""), std::invalid_argument);
  CHECK_THROWS_AS(proxy.routes("/"), std::invalid_argument);
  CHECK_THROWS_AS(proxy.routes("/my files"), std::invalid_argument);
}

TEST_CASE("own routes: cannot be added while the proxy listens") {
  Embedded proxy(cold_target(), add_routes);
  CHECK(get(proxy.port(), "/own/hello").status == 200);
  CHECK_THROWS_AS(proxy.proxy().routes("/more"), std::logic_error);
  CHECK_THROWS_AS(proxy.proxy().set_pre_routing_handler({}), std::logic_error);
}

TEST_CASE("own routes: HEAD, OPTIONS and unknown methods") {
  Embedded proxy(cold_target(), add_routes);
  RawClient client(proxy.port());
  const auto head =
      client.exchange("HEAD /own/hello HTTP/1.1\r\nHost: test\r\n\r\n");
  CHECK(head.status == 200);
  CHECK(head.header("Content-Length") == "5");
  CHECK(client.get("/own/hello").body == "hello");
  CHECK(client.exchange("OPTIONS /own/hello HTTP/1.1\r\nHost: test\r\n\r\n")
            .status != 0);
  RawClient other(proxy.port());
  CHECK(other
            .exchange("PROPFIND /own/hello HTTP/1.1\r\nHost: test\r\n"
                      "Content-Length: 3\r\n\r\nabc")
            .status >= 400);
}

TEST_CASE("own routes: pipelined with proxied requests on one connection") {
  Embedded proxy(cold_target(), add_routes);
  RawClient client(proxy.port());
  std::string requests;
  for (const std::string target :
       {"/own/hello", "/pid", "/own/number/7?q=x", "/pid", "/own/chunks"}) {
    requests += "GET " + target + " HTTP/1.1\r\nHost: test\r\n\r\n";
  }
  client.send(requests);
  CHECK(client.read_response().body == "hello");
  CHECK(client.read_response().status == 200);
  CHECK(client.read_response().body == "7?x");
  CHECK(client.read_response().status == 200);
  CHECK(client.read_response().body == "abcabcabc");
}

TEST_CASE("own routes: keep-alive is ours") {
  auto options = cold_target();
  options.keep_alive_timeout = Milliseconds(30000);
  Embedded proxy(options, add_routes);
  RawClient client(proxy.port());
  const auto kept = client.get("/own/hello");
  CHECK(kept.header("Keep-Alive") == "timeout=30");
  CHECK(kept.header("Connection") == "");
  options.keep_alive_timeout = Milliseconds(0); // never closed
  Embedded unlimited(options, add_routes);
  CHECK(get(unlimited.port(), "/own/hello").count("Keep-Alive") == 0);
  const auto closed = client.get("/own/hello", "Connection: close\r\n");
  CHECK(closed.header("Connection") == "close");
  CHECK(closed.header("Keep-Alive") == "");
  CHECK(client.at_end());
  for (const auto &[target, body] :
       {std::pair{"/own/hello", "hello"}, {"/own/chunks", "abcabcabc"}}) {
    RawClient old(proxy.port());
    old.send(std::string("GET ") + target + " HTTP/1.0\r\n\r\n");
    const auto response = old.read_response();
    CHECK(response.body == body);
    CHECK(response.header("Transfer-Encoding") == "");
    CHECK(old.at_end());
  }
  // Without chunks, only its end ends it.
  RawClient old(proxy.port());
  const auto response = old.exchange("GET /own/chunks HTTP/1.0\r\n"
                                     "Connection: keep-alive\r\n\r\n");
  CHECK(response.body == "abcabcabc");
  CHECK(response.header("Connection") == "close");
  CHECK(old.at_end());
}

// Only the end of the connection ends these, so a plain end would look
// complete.
TEST_CASE("own routes: a response that fails in its middle is reset") {
  Embedded proxy(cold_target(), [](warmproxy::Proxy &p) {
    p.routes("/own").Get(
        "/own/fails", [](const Request &, httplib::Response &res) {
          res.set_chunked_content_provider(
              "text/plain", [](std::size_t offset, httplib::DataSink &sink) {
                return offset < 3 && sink.write("abc", 3);
              });
        });
  });
  RawClient old(proxy.port());
  old.send("GET /own/fails HTTP/1.0\r\n\r\n");
  CHECK(old.read_until("abc") != "");
  CHECK(old.at_end());
  CHECK(old.was_reset());
}

TEST_CASE("own routes: a response without length or chunks ends with a close") {
  bool fails = false;
  SUBCASE("complete") {}
  SUBCASE("that fails in its middle, with a reset") { fails = true; }
  Embedded proxy(cold_target(), [fails](warmproxy::Proxy &p) {
    p.routes("/own").Get("/own/plain", [fails](const Request &,
                                               httplib::Response &res) {
      res.set_content_provider("text/plain",
                               [fails](std::size_t, httplib::DataSink &sink) {
                                 sink.write("abc", 3);
                                 if (!fails) { sink.done(); }
                                 return !fails;
                               });
    });
  });
  RawClient client(proxy.port());
  client.send("GET /own/plain HTTP/1.1\r\nHost: test\r\n\r\n");
  const auto head = client.read_response_head();
  CHECK(head.status == 200);
  CHECK(head.header("Connection") == "close");
  client.read_to_end();
  CHECK(client.was_reset() == fails);
}

// The chunks show it, and a reset would take what came before with it.
TEST_CASE("own routes: one that fails takes no complete response with it") {
  const std::string large(1 << 20, 'x');
  std::atomic<bool> failed{false};
  Embedded proxy(cold_target(), [&](warmproxy::Proxy &p) {
    auto &own = p.routes("/own");
    own.Get("/own/large", [&](const Request &, httplib::Response &res) {
      res.set_content(large, "text/plain");
    });
    own.Get("/own/fails", [&](const Request &, httplib::Response &res) {
      res.set_chunked_content_provider(
          "text/plain", [&](std::size_t offset, httplib::DataSink &sink) {
            failed = offset > 0;
            return offset == 0 && sink.write("abc", 3);
          });
    });
  });
  RawClient client(proxy.port());
  client.send("GET /own/large HTTP/1.1\r\nHost: test\r\n\r\n"
              "GET /own/fails HTTP/1.1\r\nHost: test\r\n\r\n");
  CHECK(wait_for([&] { return failed.load(); }));
  CHECK((client.read_response().body == large));
  CHECK(client.read_response_head().status == 200);
  CHECK(client.read_to_end() == "3\r\nabc\r\n");
  CHECK(!client.was_reset());
}

// Whatever the handler or cpp-httplib leaves of a request must not be read as
// the next one.
TEST_CASE("own routes: the rest of a request is no request") {
  Embedded proxy(cold_target(), add_routes);
  const std::string hidden = "GET /own/number/666 HTTP/1.1\r\nHost: x\r\n\r\n";
  for (const std::string start :
       {"GET /own/hello", "PROPFIND /own/hello", "POST /own/none"}) {
    RawClient client(proxy.port());
    client.send(start + " HTTP/1.1\r\nHost: test\r\nContent-Length: " +
                std::to_string(hidden.size()) + "\r\n\r\n" + hidden);
    client.shutdown_write();
    CHECK(client.read_to_end().find("666") == std::string::npos);
  }
}

TEST_CASE("own routes: a malformed chunk is answered") {
  Embedded proxy(cold_target(), add_routes);
  for (const std::string body :
       {"zz\r\n", "3\r\nabc\r\nzz\r\n", "3\nabc\r\n"}) {
    CAPTURE(body);
    RawClient client(proxy.port());
    client.send("POST /own/echo HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: "
                "chunked\r\n\r\n" +
                body);
    const auto response = client.read_response();
    CHECK(response.status == 400);
    CHECK(response.header("Connection") == "close");
    CHECK(client.at_end());
    CHECK(!client.was_reset());
  }
}

TEST_CASE("own routes: a body where none may be is left out") {
  Embedded proxy(cold_target(), [](warmproxy::Proxy &p) {
    add_routes(p);
    for (const int status : {204, 304}) {
      p.routes("/own").Get("/own/" + std::to_string(status),
                           [status](const Request &, httplib::Response &res) {
                             res.set_content("none", "text/plain");
                             res.status = status;
                           });
    }
  });
  for (const std::string status : {"204", "304"}) {
    CAPTURE(status);
    RawClient client(proxy.port());
    client.send("GET /own/" + status + " HTTP/1.1\r\nHost: test\r\n\r\n" +
                "GET /own/hello HTTP/1.1\r\nHost: test\r\n\r\n");
    CHECK(client.read_response().head.substr(9, 3) == status);
    CHECK(client.read_response().body == "hello");
  }
}

TEST_CASE("own routes: what an HTTP/1.0 client must not get") {
  Embedded proxy(cold_target(), add_routes);
  SUBCASE("an interim response (RFC 9110, section 15.2)") {
    RawClient client(proxy.port());
    client.send("POST /own/echo HTTP/1.0\r\nExpect: 100-continue\r\n"
                "Content-Length: 4\r\n\r\nbody");
    const auto response = client.read_response();
    CHECK(response.status == 200);
    CHECK(response.body == "body");
  }
  SUBCASE("Transfer-Encoding (RFC 9112, section 6.1)") {
    RawClient client(proxy.port());
    client.send("HEAD /own/chunks HTTP/1.0\r\n\r\n");
    const auto response = client.read_response_head();
    CHECK(response.status == 200);
    CHECK(response.header("Transfer-Encoding") == "");
  }
}

TEST_CASE("own routes: the client's address, and no invented one") {
  const std::string claims =
      "X-Forwarded-For: 6.6.6.6\r\nX-Real-IP: 6.6.6.6\r\n";
  SUBCASE("by default") {
    Embedded proxy(cold_target(), add_routes);
    CHECK(RawClient(proxy.port()).get("/own/who", claims).body ==
          "127.0.0.1||");
  }
  SUBCASE("with trust_proxy") {
    auto options = cold_target();
    options.trust_proxy = true;
    Embedded proxy(options, add_routes);
    CHECK(RawClient(proxy.port()).get("/own/who", claims).body ==
          "127.0.0.1|6.6.6.6|6.6.6.6");
  }
}

TEST_CASE("own routes: a handler that throws") {
  Embedded proxy(cold_target(), add_routes);
  CHECK(RawClient(proxy.port()).get("/own/throw").status == 500);
  CHECK(RawClient(proxy.port()).get("/own/hello").status == 200);
}

TEST_CASE("own routes: handlers that wait hold up nobody else") {
  Gate gate;
  Embedded proxy(cold_target(), [&](warmproxy::Proxy &p) {
    add_routes(p);
    p.routes("/own").Get("/own/wait",
                         [&](const Request &, httplib::Response &res) {
                           gate.wait();
                           res.set_content("waited", "text/plain");
                         });
  });
  std::list<RawClient> waiting; // more than the pool has threads
  for (int i = 0; i < 40; ++i) {
    waiting.emplace_back(proxy.port());
    waiting.back().send("GET /own/wait HTTP/1.1\r\nHost: test\r\n\r\n");
  }
  CHECK(get(proxy.port(), "/pid").status == 200); // proxied meanwhile
  waiting.pop_back();                             // one client disconnects
  gate.open();
  for (auto &client : waiting) {
    CHECK(client.read_response().body == "waited");
  }
}

TEST_CASE("own routes: stop() lets one finish") {
  Gate begun, gate;
  Embedded proxy(cold_target(), [&](warmproxy::Proxy &p) {
    p.routes("/own").Get("/own/wait",
                         [&](const Request &, httplib::Response &res) {
                           begun.open();
                           gate.wait();
                           res.set_content("waited", "text/plain");
                         });
  });
  RawClient client(proxy.port());
  client.send("GET /own/wait HTTP/1.1\r\nHost: test\r\n\r\n");
  begun.wait();
  proxy.proxy().stop();
  gate.open();
  CHECK(client.read_response().body == "waited");
  proxy.stop();
}

TEST_CASE("own routes: a stream ends with the stop budget") {
  auto options = cold_target();
  options.stop_timeout = Milliseconds(200);
  Embedded proxy(options, [](warmproxy::Proxy &p) {
    p.routes("/own").Get(
        "/own/stream", [](const Request &, httplib::Response &res) {
          res.set_chunked_content_provider(
              "text/plain", [](std::size_t, httplib::DataSink &sink) {
                poll(nullptr, 0, 1);
                return sink.write("x", 1), true;
              });
        });
  });
  RawClient client(proxy.port());
  client.send("GET /own/stream HTTP/1.1\r\nHost: test\r\n\r\n");
  client.read_until("x");
  proxy.stop();
  CHECK(client.read_to_end().find("0\r\n\r\n") == std::string::npos);
}

TEST_CASE("own routes: a stream that never writes ends with the stop budget") {
  Gate begun;
  std::atomic<bool> ended{true};
  auto options = cold_target();
  options.stop_timeout = Milliseconds(200);
  Embedded proxy(options, [&](warmproxy::Proxy &p) {
    p.routes("/own").Get(
        "/own/silent", [&](const Request &, httplib::Response &res) {
          const auto deadline = Clock::now() + patience;
          res.set_chunked_content_provider(
              "text/plain", [&, deadline](std::size_t, httplib::DataSink &) {
                begun.open();
                poll(nullptr, 0, 1);
                ended = Clock::now() < deadline;
                return ended.load();
              });
        });
  });
  RawClient client(proxy.port());
  client.send("GET /own/silent HTTP/1.1\r\nHost: test\r\n\r\n");
  begun.wait();
  proxy.stop();
  CHECK(ended);
}

// What server-sent events do between events.
TEST_CASE("own routes: a stream that waits learns that nobody listens") {
  Gate ended;
  auto options = cold_target();
  options.stop_timeout = Milliseconds(200);
  Embedded proxy(options, [&](warmproxy::Proxy &p) {
    p.routes("/own").Get(
        "/own/events", [&](const Request &, httplib::Response &res) {
          res.set_chunked_content_provider(
              "text/plain", [&](std::size_t, httplib::DataSink &sink) {
                sink.write("x", 1);
                const auto deadline = Clock::now() + patience;
                while (sink.is_writable()) {
                  if (Clock::now() > deadline) { return false; }
                  poll(nullptr, 0, 1);
                }
                ended.open();
                return false;
              });
        });
  });
  std::optional<RawClient> client(std::in_place, proxy.port());
  client->send("GET /own/events HTTP/1.1\r\nHost: test\r\n\r\n");
  client->read_until("x");
  SUBCASE("the client disconnects") { client.reset(); }
  SUBCASE("the client disconnects behind bytes that nobody reads") {
    client->send("GET /own/events HTTP/1.1\r\nHost: test\r\n\r\n");
    client->shutdown_write();
  }
  SUBCASE("the client has closed its side for a while") {
    client->shutdown_write();
  }
  SUBCASE("the stop budget is over") { proxy.proxy().stop(); }
  SUBCASE("the stop budget is over, with a pipelined request unread") {
    client->send("GET /own/events HTTP/1.1\r\nHost: test\r\n\r\n");
    proxy.proxy().stop();
  }
  CHECK_NOTHROW(ended.wait());
}

TEST_CASE("own routes: a client that has sent all gets its stream") {
  Embedded proxy(cold_target(), add_routes);
  RawClient client(proxy.port());
  client.send("GET /own/chunks HTTP/1.1\r\nHost: test\r\n\r\n");
  client.shutdown_write();
  CHECK(client.read_response().body == "abcabcabc");
}

TEST_CASE("own routes: a client may wait for 100 Continue") {
  Embedded proxy(cold_target(), add_routes);
  RawClient client(proxy.port());
  for (int i = 0; i < 2; ++i) {
    client.send("POST /own/echo HTTP/1.1\r\nHost: test\r\n"
                "Expect: 100-continue\r\nContent-Length: 4\r\n\r\n");
    CHECK(client.read_response().status == 100);
    client.send("body");
    const auto response = client.read_response();
    CHECK(response.status == 200);
    CHECK(response.body == "body");
  }
}

TEST_CASE("own routes: who responds first") {
  auto options = cold_target();
  options.status_path = "/own/status";
  options.cors_origins = {"*"};
  Embedded proxy(options, [](warmproxy::Proxy &p) {
    p.routes("/own").Options("/own/x",
                             [](const Request &, httplib::Response &res) {
                               res.set_content("own", "text/plain");
                             });
    p.set_pre_routing_handler([](const Request &, httplib::Response &res) {
      res.set_content("handler", "text/plain");
      return HandlerResponse::Handled;
    });
  });
  const std::string preflight = " HTTP/1.1\r\nHost: test\r\nOrigin: a\r\n"
                                "Access-Control-Request-Method: PUT\r\n\r\n";
  RawClient client(proxy.port());
  CHECK(client.get("/own/status").body.find("{\"state\":") == 0);
  CHECK(client.exchange("OPTIONS /own/x" + preflight).body == "own");
  CHECK(client.exchange("OPTIONS /x" + preflight).status == 204);
  CHECK(client.get("/x").body == "handler");
  CHECK(proxy.status().state == "cold");
}

namespace {

// It takes no job. Before cpp-httplib 0.15, every queue has to.
struct FullQueue : httplib::TaskQueue {
  using Result = decltype(std::declval<httplib::TaskQueue &>().enqueue({}));
  Result enqueue(std::function<void()>) override { return Result(); }
  void shutdown() override {}
};

} // namespace

TEST_CASE("own routes: more requests than the server's queue takes") {
  if (std::is_void_v<FullQueue::Result>) { return; }
  Embedded proxy(cold_target(), [](warmproxy::Proxy &p) {
    add_routes(p);
    p.routes("/own").new_task_queue = [] { return new FullQueue; };
  });
  RawClient client(proxy.port());
  for (int i = 0; i < 2; ++i) {
    const auto response = client.get("/own/hello");
    CHECK(response.status == 503);
    CHECK(response.body == "warmproxy: too many requests for own routes\n");
  }
}

// cpp-httplib before 0.27 tells handlers the address by this field, too.
TEST_CASE("own routes: the client does not name its address") {
  Embedded proxy(cold_target(), [](warmproxy::Proxy &p) {
    p.routes("/own").Get("/own/fields",
                         [](const Request &req, httplib::Response &res) {
                           std::string all;
                           for (const auto &[name, value] : req.headers) {
                             all += name + ":" + value + "\n";
                           }
                           res.set_content(all, "text/plain");
                         });
  });
  const auto fields = RawClient(proxy.port())
                          .get("/own/fields", "REMOTE_ADDR: 6.6.6.6\r\n"
                                              "Local_Addr: 6.6.6.6\r\n")
                          .body;
  CHECK(fields.find("Host:test") != std::string::npos);
  CHECK(fields.find("6.6.6.6") == std::string::npos);
}

TEST_CASE("own routes: do not count as use of the target") {
  auto options = fake_target();
  options.idle_stop = Milliseconds(100);
  Embedded proxy(options, add_routes);
  CHECK(get(proxy.port(), "/pid").status == 200);
  RawClient client(proxy.port());
  CHECK(wait_for([&] {
    CHECK(client.get("/own/hello").status == 200);
    return proxy.status().state == "cold";
  }));
}

TEST_CASE("pre-routing: handled requests do not start the target") {
  Embedded proxy(cold_target(), [](warmproxy::Proxy &p) {
    add_routes(p);
    p.set_pre_routing_handler([](const Request &req, httplib::Response &res) {
      if (req.has_header("Authorization")) {
        return HandlerResponse::Unhandled;
      }
      res.status = 401;
      res.set_header("WWW-Authenticate", "Basic");
      res.set_content(req.method + " " + req.path + " " +
                          req.get_param_value("q") + " " + req.remote_addr +
                          " " + req.get_header_value("X-Forwarded-For"),
                      "text/plain");
      return HandlerResponse::Handled;
    });
  });
  RawClient client(proxy.port());
  const auto refused =
      client.exchange("PROPFIND /a%20b?q=1+2 HTTP/1.1\r\nHost: test\r\n"
                      "X-Forwarded-For: 6.6.6.6\r\nRange: nonsense\r\n\r\n");
  CHECK(refused.status == 401);
  CHECK(refused.header("WWW-Authenticate") == "Basic");
  CHECK(refused.body == "PROPFIND /a b 1 2 127.0.0.1 ");
  CHECK(client.get("/own/hello").body == "hello"); // own routes come first
  CHECK(proxy.status().state == "cold");
  CHECK(client.get("/pid", "Authorization: Basic eA==\r\n").status == 200);
  CHECK(proxy.status().state == "up");
}

TEST_CASE("own routes: a stream that is aborted does not look complete" *
          doctest::skip(!on_linux)) {
  auto options = cold_target();
  options.stop_timeout = Milliseconds(200);
  bool silent = false;
  SUBCASE("while it writes") {}
  SUBCASE("while it waits") { silent = true; }
  Embedded proxy(options, [&](warmproxy::Proxy &p) {
    p.routes("/own").Get(
        "/own/stream", [&](const Request &, httplib::Response &res) {
          res.set_content_provider( // which ends with the connection
              "text/plain", [&](std::size_t at, httplib::DataSink &sink) {
                poll(nullptr, 0, 1);
                if (at == 0 || !silent) { sink.write("x", 1); }
                return true;
              });
        });
  });
  RawClient client(proxy.port());
  client.send("GET /own/stream HTTP/1.1\r\nHost: test\r\n\r\n");
  client.read_until("x");
  proxy.stop();
  client.read_to_end();
  CHECK(client.was_reset());
}

// Or its client would send the next request to a connection that is closing.
TEST_CASE("limits: a connection that has to make room says so in a response") {
  Gate entered_first, first, entered_second, second;
  const auto loops = std::clamp<std::size_t>(
      std::thread::hardware_concurrency(), 1, WARMPROXY_MAX_LOOPS);
  auto options = fake_target();
  options.max_connections = 2 * loops; // two in each event loop
  Embedded proxy(options, [&](warmproxy::Proxy &p) {
    add_routes(p);
    p.set_pre_routing_handler([&](const Request &req, httplib::Response &) {
      if (req.path == "/pid") { return HandlerResponse::Unhandled; }
      // These block their event loop.
      if (req.path == "/first") {
        entered_first.open();
        first.wait();
      }
      if (req.path == "/second") {
        entered_second.open();
        second.wait();
      }
      return HandlerResponse::Handled;
    });
  });
  std::list<RawClient> clients;
  for (std::size_t i = 0; i < 2 * loops; ++i) {
    clients.emplace_back(proxy.port());
    CHECK(clients.back().get(i == 0 ? "/pid" : "/").status == 200);
  }
  // These are in the first event loop, which accepts the newcomer, too.
  auto &evicted = clients.front();
  auto &other = *std::next(clients.begin(), static_cast<long>(loops));
  other.send("GET /first HTTP/1.1\r\nHost: test\r\n\r\n");
  entered_first.wait();
  RawClient newcomer(proxy.port());
  newcomer.send("GET /second HTTP/1.1\r\nHost: test\r\n\r\n");
  first.open();
  entered_second.wait();
  std::string path;
  SUBCASE("of the target") { path = "/pid"; }
  SUBCASE("of the pre-routing handler") { path = "/"; }
  SUBCASE("of an own route") { path = "/own/hello"; }
  evicted.send("GET " + path + " HTTP/1.1\r\nHost: test\r\n\r\n");
  second.open();
  const auto response = evicted.read_response();
  CHECK(response.status == 200);
  CHECK(response.header("Connection") == "close");
  CHECK(evicted.at_end());
  CHECK(newcomer.read_response().status == 200);
}

// It was idle when it was chosen.
TEST_CASE("limits: a connection that is used meanwhile makes room later") {
  const auto loops = std::clamp<std::size_t>(
      std::thread::hardware_concurrency(), 1, WARMPROXY_MAX_LOOPS);
  if (loops < 2) { return; } // while one is blocked, another one accepts
  TemporaryDirectory directory;
  const auto gate = directory / "gate";
  Gate entered, go_on;
  auto options = fake_target();
  options.max_connections = 2 * loops; // two in each event loop
  Embedded proxy(options, [&](warmproxy::Proxy &p) {
    p.set_pre_routing_handler([&](const Request &req, httplib::Response &) {
      if (req.has_header("Block")) {
        entered.open();
        go_on.wait();
      }
      return req.path == "/sse" ? HandlerResponse::Unhandled
                                : HandlerResponse::Handled;
    });
  });
  std::vector<std::unique_ptr<RawClient>> clients;
  for (std::size_t i = 0; i < 2 * loops; ++i) {
    clients.push_back(std::make_unique<RawClient>(proxy.port()));
    CHECK(clients.back()->get("/").status == 200);
  }
  // Both are in the second event loop.
  auto &chosen = *clients[1], &other = *clients[loops + 1];
  for (const auto &client : clients) {
    if (client.get() != &chosen) { CHECK(client->get("/").status == 200); }
  }
  other.send("GET /sse?n=2&gate=/never HTTP/1.1\r\nHost: test\r\n"
             "Block: 1\r\n\r\n");
  entered.wait();
  chosen.send("GET /sse?n=2&gate=" + gate + " HTTP/1.1\r\nHost: test\r\n\r\n");
  RawClient newcomer(proxy.port());
  CHECK(newcomer.get("/").status == 200);
  go_on.open();
  other.read_until("data: 1\n\n");
  chosen.read_until("data: 1\n\n");
  write_file(gate, "");
  chosen.read_until("0\r\n\r\n");
  CHECK(chosen.at_end());
  CHECK(!newcomer.readable());
}

// A handler that looks at credentials must see what the target would.
TEST_CASE("pre-routing: sees the headers whatever the Host") {
  Embedded proxy(cold_target(), [](warmproxy::Proxy &p) {
    p.set_pre_routing_handler([](const Request &req, httplib::Response &res) {
      res.set_content(req.get_header_value("Authorization"), "text/plain");
      return HandlerResponse::Handled;
    });
  });
  for (const std::string head :
       {"GET / HTTP/1.1\r\nHost: test\r\n", "GET / HTTP/1.1\r\nHost:\r\n",
        "GET / HTTP/1.0\r\n", "GET http://test/ HTTP/1.0\r\n"}) {
    CAPTURE(head);
    RawClient client(proxy.port());
    CHECK(client.exchange(head + "Authorization: A\r\n\r\n").body == "A");
  }
}

TEST_CASE("pre-routing: the framing of the response is ours") {
  Embedded proxy(cold_target(), [](warmproxy::Proxy &p) {
    p.set_pre_routing_handler([](const Request &, httplib::Response &res) {
      res.set_content("handled", "text/plain");
      res.set_header("Transfer-Encoding", "chunked");
      res.set_header("Connection", "close");
      res.set_header("Keep-Alive", "timeout=1");
      return HandlerResponse::Handled;
    });
  });
  RawClient client(proxy.port());
  for (int i = 0; i < 2; ++i) {
    const auto response = client.get("/");
    CHECK(response.body == "handled");
    CHECK(response.header("Transfer-Encoding") == "");
    CHECK(response.header("Keep-Alive") == "");
  }
}

namespace {

template <typename Response>
auto set_file(Response &res, int) -> decltype(res.set_file_content("x")) {
  res.set_file_content("/etc/passwd", "text/plain");
}
template <typename Response> void set_file(Response &, long) {
  throw std::runtime_error("cpp-httplib before 0.18 cannot do it");
}

} // namespace

TEST_CASE("pre-routing: CORS is answered once") {
  auto options = cold_target();
  options.cors_origins = {"http://a.example"};
  Embedded proxy(options, [](warmproxy::Proxy &p) {
    p.set_pre_routing_handler([](const Request &, httplib::Response &res) {
      res.set_header("Access-Control-Allow-Origin", "*");
      res.set_header("Access-Control-Expose-Headers", "A");
      return HandlerResponse::Handled;
    });
  });
  const auto response =
      RawClient(proxy.port()).get("/", "Origin: http://a.example\r\n");
  CHECK(response.count("Access-Control-Allow-Origin") == 1);
  CHECK(response.header("Access-Control-Allow-Origin") == "http://a.example");
  CHECK(response.header("Access-Control-Expose-Headers") == "A");
}

TEST_CASE(
    "pre-routing: an exception, a content provider and a file are a 500") {
  Embedded proxy(cold_target(), [](warmproxy::Proxy &p) {
    p.set_pre_routing_handler([](const Request &req, httplib::Response &res) {
      if (req.path == "/throw") { throw std::runtime_error("thrown"); }
      if (req.path == "/file") {
        set_file(res, 0);
        return HandlerResponse::Handled;
      }
      res.set_chunked_content_provider(
          "text/plain", [](std::size_t, httplib::DataSink &) { return true; });
      return HandlerResponse::Handled;
    });
  });
  RawClient client(proxy.port());
  CHECK(client.get("/throw").status == 500);
  CHECK(client.get("/provider").status == 500);
  CHECK(client.get("/file").status == 500);
}
