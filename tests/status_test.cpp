// Options::status_path, and what responses of ours disclose.

#include "figures.hpp"

using namespace support;

namespace {

bool has(const std::string &text, const std::string &part) {
  return text.find(part) != std::string::npos;
}

} // namespace

TEST_CASE("status: requests for it do not reach the target") {
  Stage stage(answering(ok()), [](warmproxy::Options &options) {
    options.status_path = "/-/status";
    options.cors_origins = {"https://a.example"};
  });
  RawClient client(stage.port());
  CHECK(client.get("/-/status").status == 200);
  CHECK(client.get("/-/status?format=prometheus").status == 200);
  CHECK(client.post("/-/status", "x", "Connection: keep-alive\r\n").status ==
        200);
  CHECK(exchange(stage.port(),
                 "OPTIONS / HTTP/1.1\r\nHost: test\r\nOrigin: "
                 "https://a.example\r\nAccess-Control-Request-Method: "
                 "PUT\r\n\r\n")
            .status == 204);
  CHECK(stage.target.requests().empty());
}

TEST_CASE("status: the documented fields and no others") {
  auto options = fake_target({"s3cret"});
  options.args = {"--args-follow", "s3cret"};
  options.status_path = "/-/status";
  RunningProxy proxy(options);
  CHECK(get(proxy.port()).status == 200);
  auto json = get(proxy.port(), "/-/status").body;
  std::vector<std::string> names;
  for (std::size_t at = 0; (at = json.find("\":", at)) != std::string::npos;) {
    const auto begin = json.rfind('"', at - 1) + 1;
    names.push_back(json.substr(begin, at - begin));
    at += 2;
  }
  CHECK(names == std::vector<std::string>{"state", "pid", "port", "starts",
                                          "last_exit", "up_seconds",
                                          "last_start_seconds", "requests",
                                          "in_flight", "connections"});
  CHECK(!has(json, "s3cret"));
  CHECK(!has(json, "/"));
}

TEST_CASE("status: none without a status path") {
  Stage stage(answering(ok("the target's")));
  for (const std::string path : {"/status", "/-/status", "/", "/metrics"}) {
    CHECK(get(stage.port(), path).body == "the target's");
  }
}

TEST_CASE("own responses: disclose no path, argument or variable") {
  TemporaryDirectory directory;
  const auto secret = directory / "s3cret";
  REQUIRE(mkdir(secret.c_str(), 0755) == 0);
  const auto program = secret + "/program";
  write_file(program, "\x7f"
                      "ELF but not really");
  chmod(program.c_str(), 0755);

  warmproxy::Options options;
  options.binary = program;
  options.args = {"--token", "s3cret"};
  options.env = {{"TOKEN", "s3cret"}};
  options.directory = secret;
  options.startup_timeout = Milliseconds(200);
  options.stop_timeout = Milliseconds(50);
  options.status_path = "/-/status";
  int expected = 502;
  std::string removed;
  SUBCASE("it cannot be executed") {}
  SUBCASE("it does not exist") { unlink(program.c_str()); }
  SUBCASE("its directory has been removed") {
    options.directory = secret + "/gone";
    REQUIRE(mkdir(options.directory.c_str(), 0755) == 0);
    removed = options.directory;
  }
  SUBCASE("it cannot be copied") { options.scratch = program + "/s3cret"; }
  SUBCASE("it ends") {
    options.binary = "/bin/sh";
    options.args = {"-c", "exit 3 # s3cret"};
  }
  SUBCASE("it does not listen") {
    options.binary = "/bin/sh";
    options.args = {"-c", "sleep 600 # s3cret"};
    expected = 504;
  }
  RunningProxy proxy(options);
  if (removed != "") { rmdir(removed.c_str()); }
  const auto checked = [&](const std::string &request) {
    const auto response = exchange(proxy.port(), request);
    CAPTURE(response.head + response.body);
    const auto text = response.head + response.body;
    CHECK(!has(text, "s3cret"));
    CHECK(!has(text, directory.path()));
    CHECK(!has(text, "asked-for"));
    CHECK(!has(text, "Server:"));
    return response.status;
  };
  const std::string host = " HTTP/1.1\r\nHost: asked-for\r\n";
  CHECK(checked("GET /asked-for" + host + "\r\n") == expected);
  CHECK(checked("GET /asked-for" + host + "Accept: text/html\r\n\r\n") >= 502);
  CHECK(checked("POST /" + host + "Content-Length: 2\r\n\r\nab") >= 502);
  CHECK(checked("GET /-/status" + host + "\r\n") == 200);
  CHECK(checked("GET /-/status?format=prometheus" + host + "\r\n") == 200);
  CHECK(checked("GET /<asked-for>\r\n\r\n") == 400);
  CHECK(checked("GET / HTTP/1.1\r\nasked-for\r\n\r\n") == 400);
  CHECK(checked("asked-for / HTTP/9.9\r\n\r\n") == 505);
  CHECK(checked("GET /" + host + "Transfer-Encoding: asked-for\r\n\r\n") ==
        501);
}

TEST_CASE("status: the body of a request for it is no request") {
  auto options = fake_target();
  options.status_path = "/status";
  RunningProxy proxy(options);
  RawClient client(proxy.port());
  const auto response =
      client.post("/status", "GET /pid HTTP/1.1\r\nHost: test\r\n\r\n");
  CHECK(response.status == 200);
  CHECK(response.header("Connection") == "close");
  CHECK(client.at_end());
  CHECK(proxy.status().state == "cold");
}
