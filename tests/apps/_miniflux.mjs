// Miniflux, a feed reader in Go that migrates its database as it starts, with
// PostgreSQL that accepts only TLS.

import http from 'node:http';
import {
  ask, assert, build, defer, fs, path, same, scratch, skip, start, test, until
} from './_support.mjs';
import { built_function, on_vercel, postgres } from './_services.mjs';

const program = path.join(build, 'miniflux/miniflux');
const admin = { name : 'admin', password : 'a long password' };

const variables = (database, name) => ({
  DATABASE_URL : database.url(name),
  RUN_MIGRATIONS : '1',
  CREATE_ADMIN : '1',
  ADMIN_USERNAME : admin.name,
  ADMIN_PASSWORD : admin.password,
  DISABLE_SCHEDULER_SERVICE : '1',
  FETCHER_ALLOW_PRIVATE_NETWORKS : '1' // the feed is on this machine
});

const basic = [
  'Authorization',
  `Basic ${Buffer.from(`${admin.name}:${admin.password}`).toString('base64')}`
];

const api = (method, where, body) => ({
  method,
  path : `/v1${where}`,
  headers : [ basic, [ 'Content-Type', 'application/json' ] ],
  ...(body ? { body : JSON.stringify(body) } : {})
});

/** A site with a feed of two entries. */
async function feed() {
  const server = http.createServer((request, response) => {
    response.setHeader('Content-Type', 'application/rss+xml');
    response.end(`<?xml version="1.0"?><rss version="2.0"><channel>
      <title>A feed</title><link>http://feed.test/</link>
      <description>d</description>
      <item><title>One ü</title><link>http://feed.test/1</link></item>
      <item><title>Two</title><link>http://feed.test/2</link></item>
      </channel></rss>`);
  });
  await new Promise((done) => server.listen(0, '127.0.0.1', done));
  defer(() => server.close());
  return `http://127.0.0.1:${server.address().port}/feed.xml`;
}

const cookies = (answer) =>
    answer.all('Set-Cookie').map((line) => line.split(';')[0]).join('; ');

/** Logs in as a browser does; gives the page that follows. */
async function log_in(send, password) {
  const form = await send({ path : '/' });
  assert.equal(form.status, 200, form.text);
  const token = /name="csrf" value="([^"]*)"/.exec(form.text);
  assert.ok(token, form.text);
  const fields = new URLSearchParams(
      { csrf : token[1], username : admin.name, password });
  const answer = await send({
    method : 'POST',
    path : '/login',
    headers : [
      [ 'Content-Type', 'application/x-www-form-urlencoded' ],
      [ 'Cookie', cookies(form) ]
    ],
    body : fields.toString()
  });
  if (answer.status !== 302) { return answer; }
  return send({
    path : answer.header('Location'),
    headers : [ [ 'Cookie', cookies(answer) || cookies(form) ] ]
  });
}

async function plain(database) {
  database.create('miniflux');
  const warm = await start({
    binary : program,
    env : (port) => ({
      ...variables(database, 'miniflux'), LISTEN_ADDR : `127.0.0.1:${port}`
    })
  });
  const send = (request) => ask(warm.port, request);

  await test('miniflux: the first request waits for the migrations', async () => {
    const answer = await send({ path : '/' });
    assert.equal(answer.status, 200, answer.text);
    assert.match(answer.header('Server-Timing'), /^warmproxy;/);
    const version =
        database.query('miniflux', 'select version from schema_version');
    assert.ok(Number(version) > 100, version);
  });

  await test('miniflux: login with its cookie and form token', async () => {
    const inside = await log_in(send, admin.password);
    assert.equal(inside.status, 200);
    assert.match(inside.text, /href="\/logout"|action="\/logout"/);
    const refused = await log_in(send, 'another password');
    assert.ok(!/\/logout"/.test(refused.text));
  });

  await test('miniflux: the API, as the program itself answers', async () => {
    const categories = await same(warm, api('GET', '/categories'));
    assert.equal(categories.json.length, 1);
    const me = await send(api('GET', '/me'));
    assert.equal(me.json.username, admin.name);
    assert.equal((await send({ path : '/v1/me' })).status, 401);
  });

  await test('miniflux: a feed is subscribed and read', async () => {
    const [ category ] = (await send(api('GET', '/categories'))).json;
    const made = await send(api('POST', '/feeds', {
      feed_url : await feed(), category_id : category.id
    }));
    assert.equal(made.status, 201, made.text);
    const { total, entries } = (await send(api(
        'GET', `/feeds/${made.json.feed_id}/entries?order=id`))).json;
    assert.equal(total, 2);
    assert.deepEqual(entries.map((each) => each.title).sort(), [ 'One ü', 'Two' ]);
    const marked = await send(api('PUT', '/entries', {
      entry_ids : [ entries[0].id ], status : 'read'
    }));
    assert.equal(marked.status, 204, marked.text);
    const unread = await send(api('GET', '/entries?status=unread'));
    assert.equal(unread.json.total, 1);
    const opml = await send(api('GET', '/export'));
    assert.match(opml.text, /feed\.xml/);
  });

  await test('miniflux: forty requests at once', async () => {
    const answers = await Promise.all(
        Array.from({ length : 40 }, () => send(api('GET', '/entries'))));
    for (const answer of answers) { assert.equal(answer.json.total, 2); }
  });

  await test('miniflux: restarted after SIGKILL with its entries', async () => {
    const { pid } = await warm.status();
    assert.ok(pid > 0);
    process.kill(pid, 'SIGKILL');
    await until('the crash is seen', async () => (await warm.status()).pid !== pid);
    assert.equal((await send(api('GET', '/entries'))).json.total, 2);
    assert.equal((await warm.status()).starts, 2);
  });

  await test('miniflux: SIGTERM ends both', () => warm.stop());
}

async function as_function(database) {
  database.create('miniflux_function');
  let instance;

  await test('miniflux: the built function migrates and serves', async () => {
    const project = scratch();
    fs.copyFileSync(program, path.join(project, 'miniflux'));
    const built = built_function(project, { BINARY : './miniflux' });
    const { environment } = JSON.parse(
        fs.readFileSync(path.join(built, '.vc-config.json')));
    instance = await on_vercel(built, './executable', {
      ...environment, ...variables(database, 'miniflux_function')
    });
    const answer = await instance.ask({ path : '/' });
    assert.equal(answer.status, 200, answer.text);
    await instance.end_of(answer.id);
  }, 600000);

  await test('miniflux: login and the API on Vercel', async () => {
    const inside = await log_in(instance.ask, admin.password);
    assert.match(inside.text, /href="\/logout"|action="\/logout"/);
    const me = await instance.ask(api('GET', '/me'));
    assert.equal(me.json.username, admin.name);
    await instance.end_of(me.id);
    assert.equal(instance.ends(me.id), 1);
    await instance.stop();
  });
}

export default async function() {
  if (!fs.existsSync(program)) {
    return skip('Miniflux', 'there is no Go here, so it was not built');
  }
  const database = await postgres();
  await plain(database);
  await as_function(database);
}
