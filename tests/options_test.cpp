// What the environment says, and what serve() refuses to start with.

#include "support.hpp"

#include <doctest/doctest.h>

#include <optional>

using namespace support;
using namespace std::chrono_literals;
using warmproxy::Options;

namespace {

const std::vector<std::string> variables = {"WARMPROXY_BINARY",
                                            "WARMPROXY_ARGS",
                                            "WARMPROXY_TARGET_PORT",
                                            "WARMPROXY_DIRECTORY",
                                            "WARMPROXY_SCRATCH",
                                            "WARMPROXY_STRIP_PREFIX",
                                            "WARMPROXY_PREWARM",
                                            "WARMPROXY_HEALTH_PATH",
                                            "WARMPROXY_STARTUP_TIMEOUT",
                                            "WARMPROXY_STOP_TIMEOUT",
                                            "WARMPROXY_IDLE_STOP",
                                            "WARMPROXY_MAX_CONNECTIONS",
                                            "WARMPROXY_CORS_ORIGINS",
                                            "WARMPROXY_CDN_CACHE",
                                            "WARMPROXY_WAITING_PAGE_AFTER",
                                            "WARMPROXY_STATUS_PATH",
                                            "PORT",
                                            "HOST"};

// Our own environment has these variables, and none other of warmproxy's, as
// long as it lives.
class Variables {
public:
  explicit Variables(const Environment &set) {
    for (const auto &name : variables) {
      const auto *value = std::getenv(name.c_str());
      before_[name] = value ? std::optional<std::string>(value) : std::nullopt;
      unsetenv(name.c_str());
    }
    for (const auto &v : set) {
      setenv(v.first.c_str(), v.second.c_str(), 1);
    }
  }
  ~Variables() {
    for (const auto &v : before_) {
      if (v.second) {
        setenv(v.first.c_str(), v.second->c_str(), 1);
      } else {
        unsetenv(v.first.c_str());
      }
    }
  }
  Variables(const Variables &) = delete;
  Variables &operator=(const Variables &) = delete;

private:
  std::map<std::string, std::optional<std::string>> before_;
};

// Where every field says something that no variable in these tests does.
Options defaults() {
  Options options;
  options.binary = "default-binary";
  options.args = {"default", "args"};
  options.target_port = 11111;
  options.env = {{"DEFAULT", "env"}};
  options.directory = "default-directory";
  options.scratch = "default-scratch";
  options.strip_prefix = "/default-prefix";
  options.prewarm = true;
  options.health_path = "/default-health";
  options.startup_timeout = 11111ms;
  options.stop_timeout = 11112ms;
  options.idle_stop = 11113ms;
  options.host = "default-host";
  options.port = 11112;
  options.max_connections = 11113;
  options.cors_origins = {"default-origin"};
  options.cdn_cache = 11114s;
  options.waiting_page_after = 11115ms;
  options.status_path = "/default-status";
  return options;
}

Options options_with(const Environment &set) {
  const Variables environment(set);
  return warmproxy::options_from_env(defaults());
}

// All of them as text, one a line, so that a difference can be read.
std::string all_fields(const Options &o) {
  std::ostringstream text;
  text << "binary " << o.binary << "\nargs";
  for (const auto &arg : o.args) {
    text << " [" << arg << "]";
  }
  text << "\ntarget_port " << o.target_port << "\nenv";
  for (const auto &v : o.env) {
    text << " " << v.first << "=" << v.second;
  }
  text << "\ndirectory " << o.directory << "\nscratch " << o.scratch
       << "\nstrip_prefix " << o.strip_prefix << "\nprewarm " << o.prewarm
       << "\nhealth_path " << o.health_path << "\nstartup_timeout "
       << o.startup_timeout.count() << "\nstop_timeout "
       << o.stop_timeout.count() << "\nidle_stop " << o.idle_stop.count()
       << "\nhost " << o.host << "\nport " << o.port << "\nmax_connections "
       << o.max_connections << "\ncors_origins";
  for (const auto &origin : o.cors_origins) {
    text << " [" << origin << "]";
  }
  text << "\ncdn_cache " << o.cdn_cache.count() << "\nwaiting_page_after "
       << o.waiting_page_after.count() << "\nstatus_path " << o.status_path
       << "\nlog " << static_cast<bool>(o.log) << "\nerror " << o.error;
  return text.str();
}

std::vector<std::string> args_of(const std::string &text) {
  const auto options = options_with({{"WARMPROXY_ARGS", text}});
  CHECK(options.error == "");
  return options.args;
}

// The words that the machine's own shell makes of it.
std::vector<std::string> shell_words(const std::string &text) {
  Process shell("/bin/sh",
                {"-c",
                 "eval \"set -- $TEXT\"; for w; do printf '%s\\0' \"$w\"; "
                 "done"},
                {{"TEXT", text}});
  CHECK(shell.wait() == 0);
  std::vector<std::string> words(1);
  for (const char c : shell.out()) {
    if (c != '\0') {
      words.back() += c;
    } else {
      words.emplace_back();
    }
  }
  words.pop_back();
  return words;
}

// How build/warmproxy ended, and the line that it left.
struct Ended {
  int status;
  std::string line;
};

Ended run_to_end(const Environment &environment,
                 const std::vector<std::string> &args = {}) {
  Process process(built("warmproxy"), args, environment);
  const auto status = process.wait();
  CHECK(process.out() == "");
  const auto err = process.err();
  CHECK(std::count(err.begin(), err.end(), '\n') == 1);
  CHECK(err.find("[warmproxy] ") == 0);
  return {status, err};
}

bool contains(const std::string &text, const std::string &part) {
  return text.find(part) != std::string::npos;
}

} // namespace

TEST_CASE("without a variable, the options are the defaults") {
  CHECK(all_fields(options_with({})) == all_fields(defaults()));
  // Nor does anything else in the environment matter.
  setenv("WARMPROXY_NO_SUCH_OPTION", "1", 1);
  CHECK(all_fields(options_with({})) == all_fields(defaults()));
  unsetenv("WARMPROXY_NO_SUCH_OPTION");
}

TEST_CASE("each variable sets its own option, and no other") {
  const struct {
    const char *name, *value;
    void (*set)(Options &);
  } cases[] = {
      {"WARMPROXY_BINARY", "./a b", [](Options &o) { o.binary = "./a b"; }},
      {"WARMPROXY_ARGS", "serve --port {port}",
       [](Options &o) {
         o.args = {"serve", "--port", "{port}"};
       }},
      {"WARMPROXY_TARGET_PORT", "23366",
       [](Options &o) { o.target_port = 23366; }},
      {"WARMPROXY_TARGET_PORT", "0", [](Options &o) { o.target_port = 0; }},
      {"WARMPROXY_TARGET_PORT", "65535",
       [](Options &o) { o.target_port = 65535; }},
      {"WARMPROXY_DIRECTORY", " /srv/x ",
       [](Options &o) { o.directory = " /srv/x "; }},
      {"WARMPROXY_SCRATCH", "/tmp/app",
       [](Options &o) { o.scratch = "/tmp/app"; }},
      {"WARMPROXY_STRIP_PREFIX", "/api",
       [](Options &o) { o.strip_prefix = "/api"; }},
      {"WARMPROXY_PREWARM", "0", [](Options &o) { o.prewarm = false; }},
      {"WARMPROXY_PREWARM", "False", [](Options &o) { o.prewarm = false; }},
      {"WARMPROXY_PREWARM", "no", [](Options &o) { o.prewarm = false; }},
      {"WARMPROXY_PREWARM", "OFF", [](Options &o) { o.prewarm = false; }},
      {"WARMPROXY_PREWARM", "1", [](Options &) {}},
      {"WARMPROXY_PREWARM", "true", [](Options &) {}},
      {"WARMPROXY_PREWARM", "Yes", [](Options &) {}},
      {"WARMPROXY_PREWARM", "on", [](Options &) {}},
      {"WARMPROXY_HEALTH_PATH", "/-/ready",
       [](Options &o) { o.health_path = "/-/ready"; }},
      {"WARMPROXY_STARTUP_TIMEOUT", "500ms",
       [](Options &o) { o.startup_timeout = 500ms; }},
      {"WARMPROXY_STOP_TIMEOUT", "45s",
       [](Options &o) { o.stop_timeout = 45s; }},
      {"WARMPROXY_IDLE_STOP", "10m", [](Options &o) { o.idle_stop = 10min; }},
      {"WARMPROXY_IDLE_STOP", "0", [](Options &o) { o.idle_stop = 0ms; }},
      {"WARMPROXY_IDLE_STOP", "0s", [](Options &o) { o.idle_stop = 0ms; }},
      {"WARMPROXY_IDLE_STOP", "007h", [](Options &o) { o.idle_stop = 7h; }},
      {"WARMPROXY_WAITING_PAGE_AFTER", "30d",
       [](Options &o) { o.waiting_page_after = 30 * 24h; }},
      {"WARMPROXY_CDN_CACHE", "24h", [](Options &o) { o.cdn_cache = 24h; }},
      {"WARMPROXY_CDN_CACHE", "3000ms", [](Options &o) { o.cdn_cache = 3s; }},
      {"WARMPROXY_MAX_CONNECTIONS", "1",
       [](Options &o) { o.max_connections = 1; }},
      {"WARMPROXY_MAX_CONNECTIONS", "100000",
       [](Options &o) { o.max_connections = 100000; }},
      {"WARMPROXY_CORS_ORIGINS", "*",
       [](Options &o) { o.cors_origins = {"*"}; }},
      {"WARMPROXY_CORS_ORIGINS",
       "https://a.example, https://b.example:8443 ,,\thttp://c",
       [](Options &o) {
         o.cors_origins = {"https://a.example", "https://b.example:8443",
                           "http://c"};
       }},
      {"WARMPROXY_STATUS_PATH", "/_status",
       [](Options &o) { o.status_path = "/_status"; }},
      {"PORT", "8080", [](Options &o) { o.port = 8080; }},
      {"PORT", "0", [](Options &o) { o.port = 0; }},
      {"HOST", "::", [](Options &o) { o.host = "::"; }},
  };
  std::set<std::string> seen;
  for (const auto &c : cases) {
    CAPTURE(c.name);
    CAPTURE(c.value);
    auto expected = defaults();
    c.set(expected);
    CHECK(all_fields(options_with({{c.name, c.value}})) ==
          all_fields(expected));
    seen.insert(c.name);
  }
  CHECK(seen.size() == variables.size());
}

TEST_CASE("a variable that is empty is an empty text or an empty list") {
  auto expected = defaults();
  expected.binary = expected.directory = expected.scratch = "";
  expected.strip_prefix = expected.health_path = expected.status_path = "";
  expected.host = "";
  expected.args.clear();
  expected.cors_origins.clear();
  CHECK(all_fields(options_with({{"WARMPROXY_BINARY", ""},
                                 {"WARMPROXY_ARGS", ""},
                                 {"WARMPROXY_DIRECTORY", ""},
                                 {"WARMPROXY_SCRATCH", ""},
                                 {"WARMPROXY_STRIP_PREFIX", ""},
                                 {"WARMPROXY_HEALTH_PATH", ""},
                                 {"WARMPROXY_CORS_ORIGINS", ""},
                                 {"WARMPROXY_STATUS_PATH", ""},
                                 {"HOST", ""}})) == all_fields(expected));
}

TEST_CASE("what cannot be read is an error that names variable and value") {
  const struct {
    std::vector<std::string> names, values;
  } cases[] = {
      {{"WARMPROXY_TARGET_PORT", "PORT"},
       {"", "x", "-1", "+1", " 1", "1 ", "1.0", "0x10", "65536", "3000tcp",
        "99999999999999999999"}},
      {{"WARMPROXY_MAX_CONNECTIONS"},
       {"", "0", "-1", "many", "1e3", "18446744073709551616"}},
      {{"WARMPROXY_PREWARM"}, {"", "2", "y", "maybe", " 1", "truee"}},
      {{"WARMPROXY_STARTUP_TIMEOUT", "WARMPROXY_STOP_TIMEOUT",
        "WARMPROXY_IDLE_STOP", "WARMPROXY_CDN_CACHE",
        "WARMPROXY_WAITING_PAGE_AFTER"},
       {"",
        "5",
        "s",
        "ms",
        "-5s",
        "+5s",
        "5 s",
        "1.5s",
        "5S",
        "5sec",
        "5s ",
        "1m30s",
        "0x5s",
        "0x",
        "0banana",
        "never",
        "99999999999999999999s",
        "9223372036854775807ms",
        "9223372036854775807d",
        "999999d"}},
      // A fraction of a second would be none at all.
      {{"WARMPROXY_CDN_CACHE"}, {"500ms", "1500ms"}},
      {{"WARMPROXY_HEALTH_PATH", "WARMPROXY_STATUS_PATH"},
       {"health", "http://a/", "*", " /"}},
      {{"WARMPROXY_ARGS"}, {"'", "\"", "a 'b", "a \"b'", "a\\", "\"a\\"}},
  };
  for (const auto &c : cases) {
    for (const auto &name : c.names) {
      for (const auto &value : c.values) {
        CAPTURE(name);
        CAPTURE(value);
        const auto error = options_with({{name, value}}).error;
        CHECK(contains(error, name));
        CHECK(contains(error, "\"" + value + "\""));
      }
    }
  }
}

TEST_CASE("an error of the environment is not overlooked") {
  const auto options =
      options_with({{"WARMPROXY_TARGET_PORT", "x"}, {"PORT", "y"}});
  CHECK(contains(options.error, "WARMPROXY_TARGET_PORT"));
  CHECK_THROWS_WITH_AS(warmproxy::Proxy{options},
                       doctest::Contains("WARMPROXY_TARGET_PORT"),
                       std::invalid_argument);
  CHECK_THROWS_AS(warmproxy::Proxy{Options{}}, std::invalid_argument);
}

TEST_CASE("arguments are split as the shell splits them") {
  using Words = std::vector<std::string>;
  const struct {
    std::string text;
    Words words;
  } cases[] = {
      {"", {}},
      {"  \t\n ", {}},
      {"server", {"server"}},
      {" a\tb  c ", {"a", "b", "c"}},
      {"'a b' \"c d\" e\\ f", {"a b", "c d", "e f"}},
      {"''", {""}},
      {"a '' \"\" b", {"a", "", "", "b"}},
      {"a''b\"\"c", {"abc"}},
      {"--dir='a b'/c", {"--dir=a b/c"}},
      {"'a\"b' \"c'd\"", {"a\"b", "c'd"}},
      {"'it'\\''s'", {"it's"}},
      {"'a\\'", {"a\\"}},
      {"\"a\\\"b\\\\c\\$d\\`e\"", {"a\"b\\c$d`e"}},
      {"\"\\a\\'\\ \"", {"\\a\\'\\ "}},
      {"\\a\\\"\\'\\\\", {"a\"'\\"}},
      {"'a\nb' \"c\nd\"", {"a\nb", "c\nd"}},
      {"serve \\\n  --port 1 \"a\\\nb\" c\\\nd 'e\\\nf'",
       {"serve", "--port", "1", "ab", "cd", "e\\\nf"}},
      {"\\\n", {}},
      {"{port} -p={port}", {"{port}", "-p={port}"}},
      {"\xE4\xB8\xAD \xFF", {"\xE4\xB8\xAD", "\xFF"}},
      {"a\rb", {"a\rb"}},
  };
  for (const auto &c : cases) {
    CAPTURE(c.text);
    CHECK(args_of(c.text) == c.words);
    CHECK(shell_words(c.text) == c.words);
  }
  // To a shell, the end of a line would be the end of the command.
  CHECK(args_of("a\nb\n\n c\n") == Words{"a", "b", "c"});
  // Nothing is expanded, nothing is run.
  CHECK(args_of("$HOME `id` $(id) ~ * a;b|c>d&e #f !g [h] {i,j}") ==
        Words{"$HOME", "`id`", "$(id)", "~", "*", "a;b|c>d&e", "#f", "!g",
              "[h]", "{i,j}"});
}

TEST_CASE("serve() does not start without a program to run") {
  TemporaryDirectory directory;
  const auto plain = directory / "plain";
  std::ofstream(plain) << "#!/bin/sh\n";
  std::string binary;
  SUBCASE("that exists") { binary = "./there-is-no-such-program"; }
  SUBCASE("on PATH") { binary = "there-is-no-such-program"; }
  SUBCASE("that may be executed") { binary = plain; }
  SUBCASE("that is a file") { binary = "/tmp"; }
  SUBCASE("that has a name") { binary = ""; }
  SUBCASE("whose name is one line") { binary = "./no\nsuch\033[31mprogram"; }
  const auto ended =
      run_to_end({{"WARMPROXY_BINARY", binary}, {"PATH", "/usr/bin:/bin"}});
  CHECK(ended.status == 2);
  for (auto &c : binary) {
    if (c == '\n' || c == '\033') { c = '?'; }
  }
  CHECK(contains(ended.line, "\"" + binary + "\""));
}

TEST_CASE("serve() does not start with a setting that cannot be read") {
  const Environment cases = {{"WARMPROXY_TARGET_PORT", "http"},
                             {"WARMPROXY_ARGS", "--name 'a"},
                             {"WARMPROXY_PREWARM", "perhaps"},
                             {"WARMPROXY_HEALTH_PATH", "health"},
                             {"WARMPROXY_STARTUP_TIMEOUT", "45"},
                             {"WARMPROXY_MAX_CONNECTIONS", "0"},
                             {"PORT", "30\n00"}};
  for (const auto &c : cases) {
    CAPTURE(c.first);
    const auto ended =
        run_to_end({{"WARMPROXY_BINARY", "/bin/true"}, {c.first, c.second}});
    CHECK(ended.status == 2);
    CHECK(contains(ended.line, c.first));
    CHECK(contains(ended.line,
                   c.first == "PORT" ? "\"30?00\"" : "\"" + c.second + "\""));
  }
}

TEST_CASE("serve() does not start where it cannot listen") {
  ScriptedTarget taken(answering(ok()));
  const auto port = std::to_string(taken.port());
  Environment environment = {{"WARMPROXY_BINARY", "/bin/true"},
                             {"WARMPROXY_TARGET_PORT", "0"},
                             {"HOST", "127.0.0.1"},
                             {"PORT", port}};
  std::string why;
  SUBCASE("the port is in use") { why = "Address already in use"; }
  SUBCASE("the port is in use, on every address") {
    environment["HOST"] = "0.0.0.0";
    why = "Address already in use";
  }
  SUBCASE("the address is somebody else's") {
    environment["HOST"] = "203.0.113.1";
    why = "Cannot assign requested address";
  }
  SUBCASE("the address is somebody else's, the port any") {
    environment["HOST"] = "203.0.113.1";
    environment["PORT"] = "0";
    why = "Cannot assign requested address";
  }
  // What else is said of it, the resolver chooses.
  SUBCASE("the address is none") { environment["HOST"] = "256.256.256.256"; }
  const auto ended = run_to_end(environment);
  CHECK(ended.status == 1);
  CHECK(contains(ended.line,
                 environment["HOST"] + ":" + environment["PORT"] + ": "));
  CHECK(contains(ended.line, why));
  CHECK(!contains(ended.line, "Success"));
}

TEST_CASE("serve() does not send its requests to itself") {
  const auto port = std::to_string(free_port());
  const auto ended = run_to_end({{"WARMPROXY_BINARY", "/bin/true"},
                                 {"WARMPROXY_TARGET_PORT", port},
                                 {"PORT", port}});
  CHECK(ended.status == 2);
  CHECK(contains(ended.line, "target_port"));
}

TEST_CASE("serve() does not guess what an argument means") {
  for (const std::string argument : {"server", "--port", "-v", "--help=me"}) {
    CAPTURE(argument);
    const auto ended =
        run_to_end({{"WARMPROXY_BINARY", "/bin/true"}}, {argument});
    CHECK(ended.status == 2);
    CHECK(contains(ended.line, argument));
    CHECK(contains(ended.line, "--help"));
  }
}

TEST_CASE("--help and --version ask for nothing else") {
  // A setting that cannot be read does not keep one from reading about it.
  const Environment environment = {{"WARMPROXY_TARGET_PORT", "x"}};
  for (const std::string argument : {"--help", "-h"}) {
    CAPTURE(argument);
    Process help(built("warmproxy"), {argument}, environment);
    CHECK(help.wait() == 0);
    CHECK(help.err() == "");
    const auto text = help.out();
    std::istringstream in(text);
    std::set<std::string> words;
    for (std::string word; in >> word;) {
      words.insert(word);
    }
    for (const auto &name : variables) {
      CAPTURE(name);
      CHECK(words.count(name) == 1);
    }
    for (const auto &line : lines_of(text)) {
      CHECK(line.size() <= 90);
    }
  }
  Process version(built("warmproxy"), {"--version"}, environment);
  CHECK(version.wait() == 0);
  CHECK(version.err() == "");
  CHECK(version.out() == "warmproxy " WARMPROXY_VERSION "\n");
}

TEST_CASE("serve() on port 0 says which one it found") {
  Process serve(built("warmproxy"), {},
                {{"WARMPROXY_BINARY", "/bin/true"},
                 {"HOST", "127.0.0.1"},
                 {"PORT", "0"}});
  REQUIRE(serve.printed("listening on 127.0.0.1:"));
  const auto line = serve.err();
  const auto port = std::atoi(line.c_str() + line.find("127.0.0.1:") +
                              std::strlen("127.0.0.1:"));
  CHECK(wait_for([&] { return listening(port); }));
  serve.signal(SIGTERM);
  CHECK(serve.wait() == 0);
}
