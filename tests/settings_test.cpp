// Settings: the environment, the command line, and what is refused, as tables
// of input and outcome.

#include "support.hpp"

#include <doctest/doctest.h>

#include <optional>

using namespace support;
using namespace std::chrono_literals;
using warmproxy::Options;
using Words = std::vector<std::string>;

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
                                            "WARMPROXY_BACKGROUND_WORK",
                                            "WARMPROXY_MAX_CONNECTIONS",
                                            "WARMPROXY_KEEP_ALIVE_TIMEOUT",
                                            "WARMPROXY_TRUST_PROXY",
                                            "WARMPROXY_CORS_ORIGINS",
                                            "WARMPROXY_CDN_CACHE",
                                            "WARMPROXY_WAITING_PAGE_AFTER",
                                            "WARMPROXY_STATUS_PATH",
                                            "PORT",
                                            "HOST"};

// Gives the test's process these variables, and no other setting, while it
// exists.
class Variables {
public:
  explicit Variables(const Environment &set) {
    for (const auto &name : variables) {
      change(name, std::nullopt);
    }
    for (const auto &v : set) {
      change(v.first, v.second);
    }
  }
  ~Variables() {
    for (const auto &v : before_) {
      put(v.first, v.second);
    }
  }
  Variables(const Variables &) = delete;
  Variables &operator=(const Variables &) = delete;

private:
  using Value = std::optional<std::string>;

  void change(const std::string &name, const Value &value) {
    const auto *before = std::getenv(name.c_str());
    before_.emplace(name, before ? Value(before) : std::nullopt);
    put(name, value);
  }
  static void put(const std::string &name, const Value &value) {
    if (value) {
      setenv(name.c_str(), value->c_str(), 1);
    } else {
      unsetenv(name.c_str());
    }
  }

  std::map<std::string, Value> before_;
};

// Every field has a value that no variable in these tests gives it.
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
  options.background_work = 11114ms;
  options.host = "default-host";
  options.port = 11112;
  options.max_connections = 11113;
  options.keep_alive_timeout = 11115ms;
  options.trust_proxy = false;
  options.cors_origins = {"https://default.example"};
  options.cdn_cache = 11116s;
  options.waiting_page_after = 11117ms;
  options.status_path = "/default-status";
  options.log = [](std::string_view) {};
  return options;
}

Options options_with(const Environment &set) {
  const Variables environment(set);
  return warmproxy::options_from_env(defaults());
}

// As text, one field a line, so that a difference can be read.
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
       << "\nbackground_work " << o.background_work.count() << "\nhost "
       << o.host << "\nport " << o.port << "\nmax_connections "
       << o.max_connections << "\nkeep_alive_timeout "
       << o.keep_alive_timeout.count() << "\ntrust_proxy " << o.trust_proxy
       << "\ncors_origins";
  for (const auto &origin : o.cors_origins) {
    text << " [" << origin << "]";
  }
  text << "\ncdn_cache " << o.cdn_cache.count() << "\nwaiting_page_after "
       << o.waiting_page_after.count() << "\nstatus_path " << o.status_path
       << "\nlog " << static_cast<bool>(o.log) << "\nerror " << o.error;
  return text.str();
}

Words args_of(const std::string &text) {
  const auto options = options_with({{"WARMPROXY_ARGS", text}});
  CHECK(options.error == "");
  return options.args;
}

// The words that the machine's own shell makes of it.
Words shell_words(const std::string &text) {
  Process shell("/bin/sh",
                {"-c",
                 "eval \"set -- $TEXT\"; for w; do printf '%s\\0' \"$w\"; "
                 "done"},
                {{"TEXT", text}});
  CHECK(shell.wait() == 0);
  Words words(1);
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

bool contains(const std::string &text, const std::string &part) {
  return text.find(part) != std::string::npos;
}

// What a Proxy throws for these options; "" if it takes them.
std::string refusal(const Options &options) {
  try {
    warmproxy::Proxy proxy(options);
    return {};
  } catch (const std::invalid_argument &error) { return error.what(); }
}

// Runs build/warmproxy, which must end with one line, and returns that.
std::string refused_line(const Words &args,
                         const Environment &environment = {}) {
  Process process(built("warmproxy"), args, environment);
  CHECK(process.wait() == 2);
  CHECK(process.out() == "");
  const auto lines = lines_of(process.err());
  REQUIRE(lines.size() == 1);
  CHECK(lines[0].substr(0, 12) == "[warmproxy] ");
  return lines[0];
}

} // namespace

// ---- the environment --------------------------------------------------------

TEST_CASE("settings: without a variable, the options are the defaults") {
  CHECK(all_fields(options_with({})) == all_fields(defaults()));
  CHECK(all_fields(options_with({{"WARMPROXY_NO_SUCH_OPTION", "1"}})) ==
        all_fields(defaults()));
}

TEST_CASE("settings: each variable sets its own option, and no other") {
  const struct {
    const char *name, *value;
    void (*set)(Options &);
  } cases[] = {
      {"WARMPROXY_ARGS", "serve --port {port}",
       [](Options &o) {
         o.args = {"serve", "--port", "{port}"};
       }},
      {"WARMPROXY_BINARY", "./a b", // and what belongs to another program
       [](Options &o) {
         o.binary = "./a b";
         o.args.clear();
         o.target_port = 0;
       }},
      {"WARMPROXY_TARGET_PORT", "23366",
       [](Options &o) { o.target_port = 23366; }},
      {"WARMPROXY_TARGET_PORT", "0", [](Options &o) { o.target_port = 0; }},
      {"WARMPROXY_TARGET_PORT", "65535",
       [](Options &o) { o.target_port = 65535; }},
      {"WARMPROXY_TARGET_PORT", "auto",
       [](Options &o) { o.target_port = warmproxy::any_port; }},
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
      {"WARMPROXY_TRUST_PROXY", "1", [](Options &o) { o.trust_proxy = true; }},
      {"WARMPROXY_TRUST_PROXY", "true",
       [](Options &o) { o.trust_proxy = true; }},
      {"WARMPROXY_TRUST_PROXY", "Yes",
       [](Options &o) { o.trust_proxy = true; }},
      {"WARMPROXY_TRUST_PROXY", "on", [](Options &o) { o.trust_proxy = true; }},
      {"WARMPROXY_HEALTH_PATH", "/-/ready?full=1",
       [](Options &o) { o.health_path = "/-/ready?full=1"; }},
      {"WARMPROXY_STARTUP_TIMEOUT", "500ms",
       [](Options &o) { o.startup_timeout = 500ms; }},
      {"WARMPROXY_STOP_TIMEOUT", "45s",
       [](Options &o) { o.stop_timeout = 45s; }},
      {"WARMPROXY_IDLE_STOP", "10m", [](Options &o) { o.idle_stop = 10min; }},
      {"WARMPROXY_IDLE_STOP", "0", [](Options &o) { o.idle_stop = 0ms; }},
      {"WARMPROXY_IDLE_STOP", "0s", [](Options &o) { o.idle_stop = 0ms; }},
      {"WARMPROXY_IDLE_STOP", "007h", [](Options &o) { o.idle_stop = 7h; }},
      {"WARMPROXY_BACKGROUND_WORK", "5s",
       [](Options &o) { o.background_work = 5s; }},
      {"WARMPROXY_KEEP_ALIVE_TIMEOUT", "2m",
       [](Options &o) { o.keep_alive_timeout = 2min; }},
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
       "https://a.example, https://b.example:8443 ,,\thttp://[::1]",
       [](Options &o) {
         o.cors_origins = {"https://a.example", "https://b.example:8443",
                           "http://[::1]"};
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

TEST_CASE("settings: an empty variable is an empty text or an empty list") {
  auto expected = defaults();
  expected.binary = expected.directory = expected.scratch = "";
  expected.strip_prefix = expected.health_path = expected.status_path = "";
  expected.host = "";
  expected.target_port = 0;
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

TEST_CASE("settings: WARMPROXY_BINARY replaces the whole program") {
  const struct {
    Environment environment;
    Words args;
    int target_port;
  } cases[] = {
      {{}, {"default", "args"}, 11111},
      {{{"WARMPROXY_BINARY", "x"}}, {}, 0},
      {{{"WARMPROXY_BINARY", "x"}, {"WARMPROXY_ARGS", "a b"}}, {"a", "b"}, 0},
      {{{"WARMPROXY_BINARY", "x"}, {"WARMPROXY_TARGET_PORT", "80"}}, {}, 80},
      {{{"WARMPROXY_ARGS", "a b"}}, {"a", "b"}, 11111},
      {{{"WARMPROXY_TARGET_PORT", "auto"}},
       {"default", "args"},
       warmproxy::any_port},
  };
  for (const auto &c : cases) {
    const auto options = options_with(c.environment);
    CHECK(options.args == c.args);
    CHECK(options.target_port == c.target_port);
  }
}

TEST_CASE("settings: what cannot be read names the variable and its value") {
  const struct {
    Words names, values;
  } cases[] = {
      {{"WARMPROXY_TARGET_PORT", "PORT"},
       {"", "x", "-1", "+1", " 1", "1 ", "1.0", "0x10", "65536", "3000tcp",
        "Auto", "any", "99999999999999999999"}},
      {{"PORT"}, {"auto"}},
      {{"WARMPROXY_MAX_CONNECTIONS"},
       {"", "0", "-1", "many", "1e3", "18446744073709551616"}},
      {{"WARMPROXY_PREWARM", "WARMPROXY_TRUST_PROXY"},
       {"", "2", "y", "maybe", " 1", "truee"}},
      {{"WARMPROXY_STARTUP_TIMEOUT", "WARMPROXY_STOP_TIMEOUT",
        "WARMPROXY_IDLE_STOP", "WARMPROXY_BACKGROUND_WORK",
        "WARMPROXY_KEEP_ALIVE_TIMEOUT", "WARMPROXY_CDN_CACHE",
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
      {{"WARMPROXY_STARTUP_TIMEOUT"}, {"0", "0s"}},
      // A fraction of a second would be none at all.
      {{"WARMPROXY_CDN_CACHE"}, {"500ms", "1500ms"}},
      {{"WARMPROXY_HEALTH_PATH", "WARMPROXY_STATUS_PATH"},
       {"health", "http://a/", "*", " /", "/a b", "/a\r\nX: y", "/\t", "/\x7f",
        "/\xc3\xa4"}},
      {{"WARMPROXY_STRIP_PREFIX"}, {"/a b", "/a\r\nX: y", "/\xc3\xa4"}},
      {{"WARMPROXY_CORS_ORIGINS"},
       {"example.org", "https://", "https://a.example/", "//a.example",
        "https://a.example,b.example", "https://*.example", "https://a@b",
        "* https://a.example", "https://a\r\nb"}},
      {{"WARMPROXY_ARGS"}, {"'", "\"", "a 'b", "a \"b'", "a\\", "\"a\\"}},
  };
  for (const auto &c : cases) {
    for (const auto &name : c.names) {
      for (const auto &value : c.values) {
        CAPTURE(name);
        CAPTURE(value);
        const auto error = options_with({{name, value}}).error;
        CHECK(contains(error, name + "=\"" + value + "\" is not "));
      }
    }
  }
}

TEST_CASE("settings: what is wrong reads as a sentence") {
  const struct {
    const char *name, *value, *error;
  } cases[] = {
      {"PORT", "http", "PORT=\"http\" is not a port (0 to 65535)"},
      {"WARMPROXY_TARGET_PORT", "any",
       "WARMPROXY_TARGET_PORT=\"any\" is not a port (0 to 65535) or auto"},
      {"WARMPROXY_IDLE_STOP", "5",
       "WARMPROXY_IDLE_STOP=\"5\" is not a duration, such as 500ms, 45s, 10m, "
       "2h or 30d"},
      {"WARMPROXY_PREWARM", "maybe",
       "WARMPROXY_PREWARM=\"maybe\" is not 1 or 0, true or false, yes or no, "
       "on or off"},
      {"WARMPROXY_ARGS", "a 'b",
       "WARMPROXY_ARGS=\"a 'b\" is not a list of arguments with all quotes "
       "closed"},
      {"WARMPROXY_MAX_CONNECTIONS", "0",
       "WARMPROXY_MAX_CONNECTIONS=\"0\" is not a number above 0"},
  };
  for (const auto &c : cases) {
    CHECK(options_with({{c.name, c.value}}).error == c.error);
  }
}

TEST_CASE("settings: a Kubernetes Service is no setting") {
  const auto options =
      options_with({{"WARMPROXY_TARGET_PORT", "tcp://10.0.0.1:80"}});
  CHECK(all_fields(options) == all_fields(defaults()));
}

TEST_CASE("settings: an error of the environment is not overlooked") {
  const auto options =
      options_with({{"WARMPROXY_TARGET_PORT", "x"}, {"PORT", "y"}});
  CHECK(contains(options.error, "WARMPROXY_TARGET_PORT"));
  CHECK(contains(refusal(options), options.error));
}

TEST_CASE("settings: a variable that is no setting is named in the log") {
  const struct {
    const char *variable;
    bool is_unknown;
  } cases[] = {
      {"WARMPROXY_IDLE_TIMEOUT=5m", true},
      {"WARMPROXY_=1", true},
      {"WARMPROXY_HOST=::", true},
      {"WARMPROXY_ARGUMENTS=", true},
      {"WARMPROXY_ARGS=a", false},
      {"WARMPROXY_ARGS", false},
      {"WARMPROXY", false},
      {"warmproxy_args=a", false},
      {"PATH=/bin", false},
      {"", false},
      // Kubernetes, for Services named "warmproxy" and "warmproxy-blog"
      {"WARMPROXY_PORT=tcp://10.0.0.1:80", false},
      {"WARMPROXY_PORT=8080", true}, // PORT is meant
      {"WARMPROXY_PORT_80_TCP_ADDR=10.0.0.1", false},
      {"WARMPROXY_SERVICE_HOST=10.0.0.1", false},
      {"WARMPROXY_SERVICE_PORT_HTTP=80", false},
      {"WARMPROXY_BLOG_PORT=udp://10.0.0.1:53", false},
      {"WARMPROXY_BLOG_PORT_80_TCP_PORT=80", false},
      {"WARMPROXY_BLOG_SERVICE_HOST=10.0.0.1", false},
      {"WARMPROXY_BLOG_PORT=80", true},
  };
  for (const auto &c : cases) {
    CAPTURE(c.variable);
    const auto warning = warmproxy::detail::unknown_setting(c.variable);
    CHECK(warning.empty() != c.is_unknown);
  }

  Words lines;
  auto options = defaults();
  options.log = [&](std::string_view line) { lines.emplace_back(line); };
  const Variables environment(
      {{"WARMPROXY_IDLE_TIMEOUT", "5m"}, {"WARMPROXY_SERVICE_HOST", "::1"}});
  CHECK(warmproxy::options_from_env(options).error == "");
  CHECK(std::count(lines.begin(), lines.end(),
                   "WARMPROXY_IDLE_TIMEOUT is not a setting: ignored; see "
                   "--help") == 1);
  for (const auto &line : lines) {
    CHECK(!contains(line, "SERVICE"));
  }
}

TEST_CASE("settings: arguments are split as the shell splits them") {
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

// ---- what a Proxy refuses ---------------------------------------------------

TEST_CASE(
    "settings: a Proxy refuses what it cannot serve, by the field's name") {
  const std::string nul("a\0b", 3);
  const struct {
    std::string field;
    std::function<void(Options &)> set;
  } cases[] = {
      {"binary", [](Options &o) { o.binary = ""; }},
      {"binary", [&](Options &o) { o.binary = nul; }},
      {"args",
       [&](Options &o) {
         o.args = {"a", nul};
       }},
      {"args",
       [](Options &o) {
         o.target_port = warmproxy::any_port;
         o.args = {"--port={port}"};
       }},
      {"env",
       [](Options &o) {
         o.target_port = warmproxy::any_port;
         o.env = {{"ADDRESS", ":{port}"}};
       }},
      {"target_port", [](Options &o) { o.target_port = -2; }},
      {"target_port", [](Options &o) { o.target_port = 65536; }},
      {"env",
       [](Options &o) {
         o.env = {{"", "x"}};
       }},
      {"env",
       [](Options &o) {
         o.env = {{"A=B", "x"}};
       }},
      {"env",
       [&](Options &o) {
         o.env = {{nul, "x"}};
       }},
      {"env",
       [&](Options &o) {
         o.env = {{"A", nul}};
       }},
      {"directory", [](Options &o) { o.directory = "/no/such/directory"; }},
      {"directory", [](Options &o) { o.directory = "/dev/null"; }},
      {"directory", [&](Options &o) { o.directory = nul; }},
      {"scratch", [&](Options &o) { o.scratch = nul; }},
      {"strip_prefix", [](Options &o) { o.strip_prefix = "/a\r\nX: y"; }},
      {"strip_prefix", [&](Options &o) { o.strip_prefix = nul; }},
      {"health_path", [](Options &o) { o.health_path = "health"; }},
      {"health_path", [](Options &o) { o.health_path = "/a b"; }},
      {"health_path", [](Options &o) { o.health_path = "/\n"; }},
      {"status_path", [](Options &o) { o.status_path = "status"; }},
      {"status_path", [](Options &o) { o.status_path = "/\x7f"; }},
      {"startup_timeout", [](Options &o) { o.startup_timeout = 0ms; }},
      {"startup_timeout", [](Options &o) { o.startup_timeout = -1ms; }},
      {"stop_timeout", [](Options &o) { o.stop_timeout = -1ms; }},
      {"idle_stop", [](Options &o) { o.idle_stop = Milliseconds::min(); }},
      {"background_work", [](Options &o) { o.background_work = -1ms; }},
      {"keep_alive_timeout", [](Options &o) { o.keep_alive_timeout = -1ms; }},
      {"waiting_page_after", [](Options &o) { o.waiting_page_after = -1ms; }},
      {"cdn_cache", [](Options &o) { o.cdn_cache = -1s; }},
      {"host", [&](Options &o) { o.host = nul; }},
      {"port", [](Options &o) { o.port = -1; }},
      {"port", [](Options &o) { o.port = 65536; }},
      {"max_connections", [](Options &o) { o.max_connections = 0; }},
      {"cors_origins", [](Options &o) { o.cors_origins = {"example.org"}; }},
      {"cors_origins", [](Options &o) { o.cors_origins = {""}; }},
      {"cors_origins",
       [](Options &o) {
         o.cors_origins = {"*", "https://a.example/"};
       }},
  };
  Options good;
  good.binary = "/bin/true";
  for (const auto &c : cases) {
    CAPTURE(c.field);
    auto options = good;
    c.set(options);
    const auto error = refusal(options);
    CHECK_MESSAGE(contains(error, "warmproxy: "), error);
    CHECK_MESSAGE(contains(error, "Options::" + c.field), error);
  }
  CHECK(refusal(good) == "");
}

TEST_CASE("settings: a Proxy takes the largest and the smallest values") {
  Options options;
  options.binary = "/bin/true";
  const auto never = Milliseconds::max();
  SUBCASE("never") {
    options.startup_timeout = options.stop_timeout = options.idle_stop = never;
    options.background_work = options.keep_alive_timeout = never;
    options.waiting_page_after = never;
    options.cdn_cache = std::chrono::seconds::max();
    options.max_connections = std::numeric_limits<std::size_t>::max();
  }
  SUBCASE("at once") {
    options.startup_timeout = 1ms;
    options.stop_timeout = options.keep_alive_timeout = 0ms;
    options.waiting_page_after = 0ms;
    options.max_connections = 1;
  }
  SUBCASE("empty") { options.health_path = options.host = ""; }
  SUBCASE("any port, a line break in an argument, origins of all kinds") {
    options.target_port = warmproxy::any_port;
    options.args = {"a\nb", "port"};
    options.env = {{"A B", "c=d\n"}};
    options.cors_origins = {"null", "chrome-extension://abc",
                            "http://localhost:3000", "http://[::1]:80"};
  }
  CHECK(refusal(options) == "");
}

// ---- the command line -------------------------------------------------------

TEST_CASE("command line: what its arguments mean") {
  const struct {
    Words arguments;
    Words command; // empty: the program stays
    bool refused = false;
  } cases[] = {
      {{}, {}},
      {{"./server"}, {"./server"}},
      {{"./server", "--port", "{port}"}, {"./server", "--port", "{port}"}},
      // Behind the program, everything is its own.
      {{"server", "--help"}, {"server", "--help"}},
      {{"server", "--", "-x"}, {"server", "--", "-x"}},
      {{"--"}, {}},
      {{"--", "server", "a"}, {"server", "a"}},
      {{"--", "-server"}, {"-server"}},
      {{"--", "--"}, {"--"}},
      {{""}, {""}},
      {{"-x"}, {}, true},
      {{"-"}, {}, true},
      {{"--port", "80"}, {}, true},
      {{"--help=me"}, {}, true},
  };
  for (const bool with_port : {false, true}) {
    const Variables environment(
        with_port ? Environment{{"WARMPROXY_TARGET_PORT", "80"}}
                  : Environment{});
    for (const auto &c : cases) {
      std::vector<const char *> argv{"warmproxy"};
      for (const auto &argument : c.arguments) {
        argv.push_back(argument.c_str());
      }
      const auto argc = static_cast<int>(argv.size());
      argv.push_back(nullptr);
      auto options = defaults(), expected = defaults();
      if (!c.command.empty()) {
        expected.binary = c.command[0];
        expected.args.assign(c.command.begin() + 1, c.command.end());
        if (!with_port) { expected.target_port = 0; }
      }
      if (c.refused) {
        expected.error = c.arguments[0] + " is not an option; see --help";
      }
      warmproxy::detail::apply_command_line(argc, argv.data(), options);
      CHECK(all_fields(options) == all_fields(expected));
    }
  }
  auto options = defaults();
  warmproxy::detail::apply_command_line(0, nullptr, options);
  CHECK(all_fields(options) == all_fields(defaults()));
}

TEST_CASE("command line: a mistake is one line, and status 2") {
  const struct {
    Words arguments;
    Words expected;
  } cases[] = {
      {{"-x"}, {"-x is not an option", "--help"}},
      {{"--port", "80"}, {"--port is not an option", "--help"}},
      {{"-\033[31m\n"}, {"-?[31m? is not an option"}},
      {{"./no-such-program", "a"}, {"./no-such-program"}},
      {{"--", "-x"}, {"-x: not found on PATH"}},
      {{""}, {"Options::binary"}},
  };
  for (const auto &c : cases) {
    const auto line = refused_line(c.arguments);
    for (const auto &part : c.expected) {
      CHECK_MESSAGE(contains(line, part), line);
    }
  }
}

TEST_CASE("command line: --help and --version need nothing else") {
  // A setting that cannot be read does not keep one from reading about it.
  const Environment environment = {{"WARMPROXY_TARGET_PORT", "x"}};
  for (const std::string argument : {"--help", "-h"}) {
    CAPTURE(argument);
    Process help(built("warmproxy"), {argument}, environment);
    CHECK(help.wait() == 0);
    CHECK(help.err() == "");
    const auto lines = lines_of(help.out());
    for (const auto &name : variables) {
      CAPTURE(name);
      // Each has a line, and a word on what it is.
      CHECK(std::count_if(lines.begin(), lines.end(), [&](const auto &line) {
              return line.compare(0, name.size() + 3, "  " + name + " ") == 0 &&
                     line.back() != ' ';
            }) == 1);
    }
    for (const auto &line : lines) {
      CHECK(line.size() <= 80);
    }
  }
  Process version(built("warmproxy"), {"--version"}, environment);
  CHECK(version.wait() == 0);
  CHECK(version.err() == "");
  CHECK(version.out() == "warmproxy " WARMPROXY_VERSION "\n");
}
