// The idle connections to the target without a proxy: which of them may be
// used, and which are closed. No loop turns, and their ages are set by hand.

#include "support.hpp"

#include <doctest/doctest.h>

using namespace support;
using warmproxy::detail::Upstream;

namespace {

// From then on an idle connection shows that the target leaves it open.
constexpr Milliseconds fresh_time(1000);

struct User : warmproxy::detail::Task {
  Next run() override { return Next::wait; }
  warmproxy::detail::Time deadline() const override {
    return warmproxy::detail::Time::max();
  }
};

// The pool, with a target that does nothing by itself.
struct Pool {
  Pool() {
    warmproxy::detail::SocketAddress address({false, 0});
    listener = warmproxy::detail::new_socket(AF_INET);
    if (bind(listener.get(), address.get(), address.size) != 0 ||
        listen(listener.get(), 64) != 0) {
      fail("a target");
    }
    port = warmproxy::detail::local_address(listener).port();
  }

  // A new connection, which is in use.
  std::unique_ptr<Upstream> open() {
    auto upstream = pool.open({false, port}, 1, client);
    if (!upstream) { fail("open"); }
    peers.emplace_back(accept(listener.get(), nullptr, nullptr));
    return upstream;
  }
  // One that has been idle for `age`. It stays the pool's.
  Upstream &add(Milliseconds age = Milliseconds(0)) {
    auto upstream = open();
    auto &idle = *upstream;
    pool.release(std::move(upstream));
    idle.idle_since -= age;
    return idle;
  }
  // Whether a request gets an idle connection, which is closed then.
  bool takes(bool repeatable, std::uint64_t generation = 1) {
    auto upstream = pool.take(client, generation, repeatable);
    const bool taken = upstream != nullptr;
    if (taken) { pool.close(std::move(upstream)); }
    return taken;
  }
  // Has it learn that the target leaves idle connections open.
  void learn() {
    add(fresh_time);
    pool.run();
    REQUIRE(takes(true));
    add();
    REQUIRE(takes(false));
  }

  // The clock begins with a second, so that this is not before it began.
  const warmproxy::detail::Time began = warmproxy::detail::RunningClock::now();
  warmproxy::detail::Descriptor listener;
  int port = 0;
  std::list<Socket> peers; // the target's ends, the oldest first
  warmproxy::detail::Config config;
  warmproxy::detail::Log log{config};
  User client;
  warmproxy::detail::Loop loop{log};
  warmproxy::detail::UpstreamPool pool{loop};
};

bool speaks(const Upstream &upstream) {
  return wait_for([&] { return !upstream.is_silent(); });
}

} // namespace

TEST_CASE("pool: a connection to an earlier target serves no request") {
  Pool p;
  p.add();
  CHECK(!p.takes(true, 2));
  CHECK(p.peers.back().at_end());
  p.add();
  CHECK(p.takes(true, 1));
}

// What comes before the next request is no response to it.
TEST_CASE("pool: an idle connection that is not silent serves no request") {
  Pool p;
  p.learn();
  auto &idle = p.add();
  REQUIRE(idle.is_silent());
  SUBCASE("once the event has come") {
    p.peers.back().send("x");
    REQUIRE(speaks(idle));
    idle.readable = true;
    CHECK(!p.takes(true));
  }
  SUBCASE("and before, if the request must not be sent twice") {
    p.peers.back().send("x");
    REQUIRE(speaks(idle));
    CHECK(!p.takes(false));
  }
  SUBCASE("nor one that has ended") {
    p.peers.back().close();
    REQUIRE(speaks(idle));
    CHECK(!p.takes(false));
  }
  CHECK(p.pool.idle_count() == 0);
}

TEST_CASE("pool: an early end takes the trust from the others, too") {
  Pool p;
  p.learn();
  p.add();
  auto &latest = p.add();
  p.peers.back().close();
  REQUIRE(speaks(latest));
  CHECK(!p.takes(false));
}

TEST_CASE("pool: one connection is set aside to learn whether it stays open") {
  Pool p;
  auto first = p.open();
  auto &aside = *first;
  p.pool.retire(std::move(first));
  p.pool.retire(p.open());
  CHECK(p.pool.idle_count() == 1);
  CHECK(p.peers.back().at_end());
  CHECK(!p.takes(true));
  // Having served its purpose, it is closed.
  aside.idle_since -= fresh_time;
  p.pool.run();
  CHECK(p.peers.front().at_end());
  CHECK(p.pool.idle_count() == 0);
  p.add();
  CHECK(p.takes(false));
  // An early end makes it learn again.
  p.pool.note_early_end();
  p.pool.retire(p.open());
  CHECK(p.pool.idle_count() == 1);
  p.add();
  CHECK(!p.takes(false));
}

TEST_CASE("pool: idle connections have a time limit") {
  Pool p;
  const Milliseconds limit(WARMPROXY_UPSTREAM_IDLE_TIMEOUT);
  p.add(limit);
  p.add(limit - Milliseconds(1));
  p.pool.run();
  CHECK(p.pool.idle_count() == 1);
  CHECK(p.peers.front().at_end());
}

TEST_CASE("pool: the oldest spare connections are closed, but for that which "
          "was set aside") {
  Pool p;
  p.pool.retire(p.open());
  for (int i = 0; i < WARMPROXY_SPARE_UPSTREAMS + 2; ++i) {
    p.add();
  }
  CHECK(p.pool.idle_count() == WARMPROXY_SPARE_UPSTREAMS);
  CHECK(!p.peers.front().readable());
  CHECK(std::next(p.peers.begin())->at_end());
  CHECK(!p.peers.back().readable());
}

TEST_CASE("pool: a login under way is not closed for a target that waits") {
  Pool p;
  auto &idle = p.add();
  idle.authenticated = true;
  p.add();
  p.pool.request_close_idle();
  p.pool.run();
  CHECK(p.peers.back().at_end());
  CHECK(p.pool.idle_count() == 1);
  idle.idle_since -= fresh_time; // it is over
  p.pool.request_close_idle();
  p.pool.run();
  CHECK(p.pool.idle_count() == 0);
}
