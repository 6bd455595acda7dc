// build/warmproxy from outside: what it says, what it refuses at its start, and
// where it looks for the target.

#include "support.hpp"

#include <doctest/doctest.h>

#include <filesystem>

using namespace support;

namespace {

std::size_t count_lines(const std::string &text) {
  return lines_of(text).size();
}

// What the process runs.
std::string executable(const std::string &pid) {
  return std::filesystem::read_symlink("/proc/" +
                                       pid.substr(0, pid.find('\n')) + "/exe");
}

} // namespace

TEST_CASE("what cannot work ends it at its start, with one clear line") {
  TemporaryDirectory directory;
  const auto starts = directory / "starts";
  auto environment = serve_fake({"--count-file", starts});
  environment["WARMPROXY_PREWARM"] = "1";
  std::vector<std::string> expected;
  const auto set = [&](const std::string &name, const std::string &value) {
    environment[name] = value;
    expected = {name, value};
  };

  SUBCASE("a time") { set("WARMPROXY_IDLE_STOP", "soon"); }
  SUBCASE("a time without a unit") { set("WARMPROXY_STOP_TIMEOUT", "10"); }
  SUBCASE("an empty time") { set("WARMPROXY_STARTUP_TIMEOUT", ""); }
  SUBCASE("a port") { set("PORT", "http"); }
  SUBCASE("a port beyond ports") { set("WARMPROXY_TARGET_PORT", "65536"); }
  SUBCASE("a number") { set("WARMPROXY_MAX_CONNECTIONS", "-1"); }
  SUBCASE("yes or no") { set("WARMPROXY_PREWARM", "perhaps"); }
  SUBCASE("a quote that does not end") { set("WARMPROXY_ARGS", "a 'b"); }
  SUBCASE("no binary") { environment["WARMPROXY_BINARY"] = ""; }
  SUBCASE("a missing binary") {
    set("WARMPROXY_BINARY", directory / "missing");
    expected = {directory / "missing"};
  }
  SUBCASE("one that is not on PATH") {
    set("WARMPROXY_BINARY", "no-such-program");
    expected = {"no-such-program"};
  }
  SUBCASE("one that is not executable") {
    write_file(directory / "text", "#!/bin/sh\n");
    environment["WARMPROXY_BINARY"] = directory / "text";
    expected = {directory / "text", "not executable"};
  }
  SUBCASE("one that is a directory") {
    environment["WARMPROXY_BINARY"] = directory.path();
    expected = {directory.path()};
  }
  SUBCASE("an address that is not ours") {
    environment["HOST"] = "192.0.2.1"; // RFC 5737: nobody's
    expected = {"192.0.2.1", "Cannot assign requested address"};
  }
  SUBCASE("an address that is none") {
    environment["HOST"] = "not an address";
    expected = {"not an address"};
  }

  ServeProcess serve(environment, false);
  CHECK(serve.wait() != 0);
  const auto said = serve.err();
  CHECK(said.substr(0, 12) == "[warmproxy] ");
  CHECK(count_lines(said) == 1);
  for (const auto &word : expected) {
    CHECK_MESSAGE(said.find(word) != std::string::npos, said);
  }
  CHECK_MESSAGE(said.find("Success") == std::string::npos, said);
  CHECK(serve.out() == "");
  CHECK(read_file(starts) == "");
}

TEST_CASE("a port that is taken is not shared") {
  TemporaryDirectory directory;
  auto environment = serve_fake({"--count-file", directory / "starts"});
  environment["WARMPROXY_PREWARM"] = "1";
  ScriptedTarget other(answering(ok()));
  std::unique_ptr<ServeProcess> first;
  SUBCASE("with a stranger") {
    environment["PORT"] = std::to_string(other.port());
  }
  SUBCASE("with another one of us") {
    first = std::make_unique<ServeProcess>(serve_fake());
    environment["PORT"] = std::to_string(first->port());
  }
  ServeProcess serve(environment, false);
  CHECK(serve.wait() != 0);
  const auto said = serve.err();
  CHECK(count_lines(said) == 1);
  CHECK_MESSAGE(
      said.find("127.0.0.1:" + environment["PORT"]) != std::string::npos, said);
  CHECK_MESSAGE(said.find("Address already in use") != std::string::npos, said);
  CHECK(read_file(directory / "starts") == "");
}

TEST_CASE("nothing is started before there is a request") {
  TemporaryDirectory directory;
  ServeProcess serve(serve_fake({"--count-file", directory / "starts"}));
  RawClient silent(serve.port());
  CHECK(exchange(serve.port(), "GET / HTTP/1.1\r\n\r\n").status == 400);
  CHECK(read_file(directory / "starts") == "");
  CHECK(get(serve.port()).status == 200);
  CHECK(count_lines(read_file(directory / "starts")) == 1);
}

TEST_CASE("a free port is named") {
  auto environment = serve_fake();
  environment["PORT"] = "0";
  ServeProcess serve(environment, false);
  const std::string before = "listening on 127.0.0.1:";
  REQUIRE(serve.printed(before));
  const auto said = serve.err();
  const auto port = std::atoi(said.c_str() + said.find(before) + before.size());
  CHECK(get(port).status == 200);
}

TEST_CASE("what it logs of a target's life") {
  auto environment = serve_fake();
  environment["WARMPROXY_IDLE_STOP"] = "50ms";
  ServeProcess serve(environment);
  const auto pid = get(serve.port(), "/pid").body;
  CHECK(serve.printed("target up in "));
  CHECK(serve.printed("(pid " + pid.substr(0, pid.size() - 1) + ", port "));
  CHECK(serve.printed("nothing to do for 0.05 s"));
  for (const auto &line : lines_of(serve.err())) {
    CHECK_MESSAGE(line.substr(0, 12) == "[warmproxy] ", line);
  }
  serve.signal(SIGTERM);
  CHECK(serve.wait() == 0);
  CHECK(serve.out() == "");
}

TEST_CASE("the binary is looked for") {
  namespace fs = std::filesystem;
  TemporaryDirectory directory;
  const auto here = directory / "here", there = directory / "there";
  fs::create_directories(here + "/bin");
  fs::create_directories(there + "/bin");
  fs::copy_file(built("warmproxy"), there + "/warmproxy");
  fs::copy_file(built("fake"), there + "/bin/fake");
  Environment environment = {
      {"WARMPROXY_BINARY", "bin/fake"},      {"WARMPROXY_ARGS", ""},
      {"WARMPROXY_TARGET_PORT", "0"},        {"HOST", "127.0.0.1"},
      {"PORT", std::to_string(free_port())}, {"PATH", here + "/bin"}};
  auto expected = here + "/bin/fake";
  bool also_here = true;
  SUBCASE("from the current directory") {}
  SUBCASE("then beside this executable") {
    also_here = false;
    expected = there + "/bin/fake";
  }
  SUBCASE("on PATH, without a slash") {
    environment["WARMPROXY_BINARY"] = "fake";
  }
  if (also_here) { fs::copy_file(built("fake"), expected); }
  Process serve(there + "/warmproxy", {}, environment, here);
  const auto port = std::atoi(environment["PORT"].c_str());
  REQUIRE(wait_for([&] { return listening(port) || !serve.running(); }));
  CHECK(serve.err() != "");
  CHECK(executable(get(port, "/pid").body) == expected);
}

TEST_CASE("--help and --version") {
  const auto said_to = [](const std::vector<std::string> &args, int status) {
    Process process(built("warmproxy"), args);
    CHECK(process.wait() == status);
    CHECK((status == 0 ? process.err() : process.out()) == "");
    return process.out() + process.err();
  };
  CHECK(said_to({"--version"}, 0) == "warmproxy " WARMPROXY_VERSION "\n");
  const auto help = said_to({"--help"}, 0);
  for (const auto *variable :
       {"BINARY", "ARGS", "TARGET_PORT", "DIRECTORY", "SCRATCH", "STRIP_PREFIX",
        "PREWARM", "HEALTH_PATH", "STARTUP_TIMEOUT", "STOP_TIMEOUT",
        "IDLE_STOP", "MAX_CONNECTIONS", "CORS_ORIGINS", "CDN_CACHE",
        "WAITING_PAGE_AFTER", "STATUS_PATH"}) {
    CHECK_MESSAGE(help.find("WARMPROXY_" + std::string(variable)) !=
                      std::string::npos,
                  variable);
  }
  for (const auto &line : lines_of(help)) {
    CHECK(line.size() <= 80);
  }
  const auto said = said_to({"serve"}, 2);
  CHECK(count_lines(said) == 1);
  CHECK(said.find("serve") != std::string::npos);
}
