// Waline, a comment server for Node.js, with PostgreSQL that accepts only TLS.

import http from 'node:http';
import {
  ask, assert, build, defer, fs, path, skip, start, test, until
} from './_support.mjs';
import { postgres } from './_services.mjs';

const program =
    path.join(build, 'waline/node_modules/@waline/vercel/vanilla.js');

// Waline leaves its tables to its administrator.
const tables = `
create table wl_comment (
  id serial primary key, user_id int, comment text, insertedat timestamptz,
  ip text, link text, mail text, nick text, pid int, rid int, sticky numeric,
  status text not null default '', "like" int, ua text, url text,
  createdat timestamptz default now(), updatedat timestamptz default now());
create table wl_counter (
  id serial primary key, time int, reaction0 int, reaction1 int, reaction2 int,
  reaction3 int, reaction4 int, reaction5 int, reaction6 int, reaction7 int,
  reaction8 int, url text not null,
  createdat timestamptz default now(), updatedat timestamptz default now());
create table wl_users (
  id serial primary key, display_name text not null, email text not null,
  password text not null, type text not null, label text, url text, avatar text,
  github text, twitter text, facebook text, google text, weibo text, qq text,
  oidc text, huawei text, "2fa" text,
  createdat timestamptz default now(), updatedat timestamptz default now());
`;

const post = (where, body, headers = []) => ({
  method : 'POST',
  path : where,
  headers : [ [ 'Content-Type', 'application/json' ], ...headers ],
  body : JSON.stringify(body)
});

const page = '/posts/1.html';
const comment = (text, headers) => post('/api/comment?lang=en', {
  comment : text, nick : 'Visitor', mail : 'visitor@warm.test', url : page,
  ua : 'test'
}, headers);
const list = { path : `/api/comment?path=${encodeURIComponent(page)}&pageSize=100` };

/** Waline answers 200 to all it understood; `errno` says how it went. */
function data(answer) {
  assert.equal(answer.status, 200, answer.text);
  assert.ok(!answer.json.errno, answer.text);
  return answer.json.data;
}

/** Waline asks a service for its login providers before every answer. */
async function login_providers() {
  const server = http.createServer((request, response) => {
    response.setHeader('Content-Type', 'application/json');
    response.end('{"services":[]}');
  });
  await new Promise((done) => server.listen(0, '127.0.0.1', done));
  defer(() => server.close());
  return `http://127.0.0.1:${server.address().port}`;
}

export default async function() {
  if (!fs.existsSync(program)) {
    return skip('Waline', '@waline/vercel is not installed in build/waline');
  }
  const database = await postgres();
  database.create('waline');
  database.query('waline', tables);
  const warm = await start({
    binary : process.execPath,
    args : [ program, '{port}' ],
    env : {
      PG_HOST : database.host,
      PG_PORT : String(database.port),
      PG_DB : 'waline',
      PG_USER : database.user,
      PG_PASSWORD : database.password,
      PG_SSL : 'true',
      OAUTH_URL : await login_providers(),
      IPQPS : '0',            // comments of one address in quick succession
      AKISMET_KEY : 'false'   // a service elsewhere
    }
  });

  await test('waline: a comment as the first request, and the list', async () => {
    const stored = data(await ask(warm.port, comment('the **first**', [
      [ 'X-Forwarded-For', '203.0.113.9' ]
    ])));
    assert.match(stored.comment, /<strong>first<\/strong>/);
    const { count, data : comments } = data(await ask(warm.port, list));
    assert.equal(count, 1);
    assert.equal(comments[0].nick, 'Visitor');
    assert.equal(comments[0].comment, stored.comment);
  });

  await test('waline: the visitor\'s address is the peer\'s, whatever it claims', () => {
    assert.match(database.query('waline', 'select ip from wl_comment'),
                 /127\.0\.0\.1$/);
  });

  await test('waline: the counter of a page', async () => {
    for (let i = 1; i <= 3; i++) {
      const [ { time } ] = data(await ask(warm.port, post(
          '/api/article?lang=en', { path : page, type : 'time', action : 'inc' })));
      assert.equal(Number(time), i);
    }
    const [ { time } ] = data(await ask(warm.port, {
      path : `/api/article?path=${encodeURIComponent(page)}&type=time`
    }));
    assert.equal(Number(time), 3);
  });

  await test('waline: twenty comments at once', async () => {
    const posted = await Promise.all(Array.from(
        { length : 20 }, (_, i) => ask(warm.port, comment(`number ${i}`))));
    posted.forEach(data);
    const { data : comments } = data(await ask(warm.port, list));
    const listed = new Set(comments.map((each) => each.comment.trim()));
    for (let i = 0; i < 20; i++) { assert.ok(listed.has(`<p>number ${i}</p>`), i); }
  });

  await test('waline: CORS for the page that shows the comments', async () => {
    const origin = 'https://blog.test';
    const answer = await ask(
        warm.port, { ...list, headers : [ [ 'Origin', origin ] ] });
    assert.ok([ '*', origin ].includes(answer.header('Access-Control-Allow-Origin')));
  });

  await test('waline: restarted after SIGKILL with its comments', async () => {
    const { pid } = await warm.status();
    assert.ok(pid > 0);
    process.kill(pid, 'SIGKILL');
    await until('the crash is seen', async () => (await warm.status()).pid !== pid);
    assert.equal(data(await ask(warm.port, list)).count, 21);
    assert.equal((await warm.status()).starts, 2);
  });

  await test('waline: SIGTERM ends both', () => warm.stop());
}
