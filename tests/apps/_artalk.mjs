// Artalk by the recipe in tests/vercel/README.md, with PostgreSQL that accepts
// only TLS and with Redis. The program is the user's: make test-apps ARTALK=path
// (2.10.0 or newer).

import {
  ask, assert, fs, path, scratch, skip, start, test, until
} from './_support.mjs';
import {
  built_function, mail_server, on_vercel, postgres, redis
} from './_services.mjs';

const site = 'https://blog.test';
const page = '/posts/1.html';
const admin = { name : 'admin', email : 'admin@warm.test', password : 'secret' };

// The file from the recipe, and the same without an address to listen on.
const settings = `
locale: en
timezone: UTC
site_default: My Site
login_timeout: 259200
log: { enabled: false }
img_upload: { enabled: false }
http: { proxy_header: X-Forwarded-For }
`;
const with_port = `host: 127.0.0.1\nport: 23366\n${settings}`;

/** A project's folder with Artalk and its configuration file. */
function project(program, configuration) {
  const folder = scratch();
  fs.copyFileSync(program, path.join(folder, 'artalk'));
  fs.chmodSync(path.join(folder, 'artalk'), 0o755);
  fs.writeFileSync(path.join(folder, 'artalk.yml'), configuration);
  return folder;
}

function variables(database, cache, mail) {
  return {
    ATK_APP_KEY : 'one key for all instances',
    ATK_SITE_URL : site,
    ATK_TRUSTED_DOMAINS : site,
    ATK_DB_TYPE : 'pgsql',
    ATK_DB_SSL : 'true',
    ATK_DB_HOST : database.host,
    ATK_DB_PORT : String(database.port),
    ATK_DB_NAME : 'artalk',
    ATK_DB_USER : database.user,
    ATK_DB_PASSWORD : database.password,
    ATK_CACHE_ENABLED : 'true',
    ATK_CACHE_TYPE : 'redis',
    ATK_CACHE_SERVER : cache.address,
    ATK_CACHE_REDIS_PASSWORD : cache.password,
    ATK_ADMIN_USERS_0_NAME : admin.name,
    ATK_ADMIN_USERS_0_EMAIL : admin.email,
    ATK_ADMIN_USERS_0_PASSWORD : admin.password,
    ATK_ADMIN_NOTIFY_EMAIL_ENABLED : 'true',
    ATK_EMAIL_ENABLED : 'true',
    ATK_EMAIL_SEND_TYPE : 'smtp',
    ATK_EMAIL_SEND_ADDR : 'noreply@warm.test',
    ATK_EMAIL_SMTP_HOST : '127.0.0.1',
    ATK_EMAIL_SMTP_PORT : String(mail.port)
  };
}

const json_request = (method, path, body, headers = []) => ({
  method,
  path : `/api/v2${path}`,
  headers : [ [ 'Content-Type', 'application/json' ], ...headers ],
  body : JSON.stringify(body)
});

const comment = (content, headers) => json_request('POST', '/comments', {
  name : 'Visitor',
  email : 'visitor@warm.test',
  content,
  page_key : page,
  page_title : 'One',
  site_name : 'My Site'
}, headers);

const list = {
  path : `/api/v2/comments?page_key=${encodeURIComponent(page)}&site_name=My+Site&limit=100`
};

const contents = (answer) => {
  assert.equal(answer.status, 200, answer.text);
  return answer.json.comments.map((each) => each.content_marked);
};
const includes = (answer, content) =>
    contents(answer).some((each) => each.includes(content));

const comment_address = (database, content) => database.query(
    'artalk', `select ip from comments where content = '${content}'`);

// process.kill(0) would kill this process and its group.
function kill_target({ pid }) {
  assert.ok(pid > 0, 'the target is not running');
  process.kill(pid, 'SIGKILL');
}

async function plain(program, database, cache, env) {
  const folder = project(program, with_port);
  const instance = (more = {}) => start({
    binary : './artalk',
    args : [ 'server', '-w', '.' ],
    cwd : folder,
    // Port 23366 may be taken here; the environment overrides artalk.yml.
    env : (port) => ({ ...env, ATK_PORT : String(port) })
  }, more);
  let warm;

  await test('artalk: the first request starts it', async () => {
    warm = await instance();
    const answer = await ask(warm.port, { path : '/api/v2/version' });
    assert.equal(answer.status, 200, answer.text);
    assert.match(answer.json.version, /^v?2\.\d+\.\d+/);
    assert.match(answer.header('Server-Timing'), /^warmproxy;/);
  });

  await test('artalk: a comment and the list', async () => {
    const posted = await ask(warm.port, comment('the first', [
      [ 'X-Forwarded-For', '203.0.113.9' ]
    ]));
    assert.equal(posted.status, 200, posted.text);
    assert.ok(includes(await ask(warm.port, list), 'the first'));
  });

  await test('artalk: the visitor\'s address is the peer\'s, whatever it claims', () => {
    assert.equal(comment_address(database, 'the first'), '127.0.0.1');
  });

  await test('artalk: with trust_proxy the address is the one from the front', async () => {
    const front = await instance({ trust_proxy : '1' });
    const posted = await ask(front.port, comment('by way of a front', [
      [ 'X-Forwarded-For', '203.0.113.9' ]
    ]));
    assert.equal(posted.status, 200, posted.text);
    assert.match(comment_address(database, 'by way of a front'), /^203\.0\.113\.9/);
    await front.stop();
  });

  await test('artalk: the cache is in Redis', async () => {
    await ask(warm.port, list);
    assert.ok(cache.keys() > 0);
  });

  await test('artalk: CORS for the trusted site only', async () => {
    for (const [ origin, allowed ] of [ [ site, site ], [ 'https://else.test', undefined ] ]) {
      const preflight = await ask(warm.port, {
        method : 'OPTIONS',
        path : '/api/v2/comments',
        headers : [
          [ 'Origin', origin ], [ 'Access-Control-Request-Method', 'POST' ],
          [ 'Access-Control-Request-Headers', 'content-type' ]
        ]
      });
      assert.equal(preflight.status, 204);
      assert.equal(preflight.header('Access-Control-Allow-Origin') || undefined, allowed);
      const read = await ask(warm.port, { ...list, headers : [ [ 'Origin', origin ] ] });
      assert.equal(read.header('Access-Control-Allow-Origin') || undefined, allowed);
    }
  });

  await test('artalk: forty comments at once', async () => {
    const posted = await Promise.all(Array.from(
        { length : 40 }, (_, i) => ask(warm.port, comment(`number ${i}.`))));
    for (const each of posted) { assert.equal(each.status, 200, each.text); }
    const listed = contents(await ask(warm.port, list));
    for (let i = 0; i < 40; i++) {
      assert.ok(listed.some((each) => each.includes(`number ${i}.`)), `number ${i}`);
    }
  });

  await test('artalk: restarted after SIGKILL under load', async () => {
    const before = await warm.status();
    const reads = Array.from({ length : 20 }, () => ask(warm.port, list));
    kill_target(before);
    const statuses = (await Promise.allSettled(reads)).map(
        (each) => each.status === 'fulfilled' ? each.value.status : 'aborted');
    assert.ok(statuses.every((status) => [ 200, 502, 'aborted' ].includes(status)),
              String(statuses));
    const posted = await ask(warm.port, comment('after the crash'));
    assert.equal(posted.status, 200, posted.text);
    const after = await ask(warm.port, list);
    assert.ok(includes(after, 'after the crash') && includes(after, 'the first'));
    assert.equal((await warm.status()).starts, before.starts + 1);
  });

  await test('artalk: a second instance has the comments and knows the login', async () => {
    const second = await instance();
    assert.ok(includes(await ask(second.port, list), 'after the crash'));
    const login = await ask(
        warm.port, json_request('POST', '/user/access_token', admin));
    assert.equal(login.status, 200, login.text);
    const sites = (headers) => ask(second.port, { path : '/api/v2/sites', headers });
    assert.equal((await sites([
      [ 'Authorization', `Bearer ${login.json.token}` ]
    ])).status, 200);
    assert.notEqual((await sites([])).status, 200);
    await second.stop();
  });

  await test('artalk: SIGTERM lets a comment finish and ends both', async () => {
    const posted = ask(warm.port, comment('at the end'));
    await until('the comment is in progress or stored', async () =>
        (await warm.status()).in_flight > 0 || comment_address(database, 'at the end'));
    await warm.stop();
    assert.equal((await posted).status, 200);
    assert.equal(comment_address(database, 'at the end'), '127.0.0.1');
  });
}

async function without_a_port(program, env) {
  const folder = project(program, settings);
  const target = {
    binary : './artalk', args : [ 'server', '-w', '.' ], cwd : folder, env
  };

  await test('artalk: without a port in artalk.yml, the log and the 504 name its port', async () => {
    const warm = await start(target, { startup_timeout : '4s' });
    const answer = await ask(warm.port, list);
    assert.equal(answer.status, 504);
    const named = /artalk listens on port (\d+)/.exec(warm.output);
    assert.ok(named, warm.output);
    assert.ok(answer.text.includes(named[1]), answer.text);
    assert.match(warm.output, /WARMPROXY_TARGET_PORT/);
    await warm.stop();
  });

  await test('artalk: without a port in artalk.yml, target_port auto finds it', async () => {
    const warm = await start(target, { target_port : 'auto' });
    assert.ok(includes(await ask(warm.port, list), 'the first'));
    const before = await warm.status();
    kill_target(before);
    await until('the crash is seen', async () => (await warm.status()).state !== 'up');
    assert.ok(includes(await ask(warm.port, list), 'the first'));
    assert.equal((await warm.status()).starts, 2);
    await warm.stop();
  });
}

async function as_function(program, database, mail, env) {
  let instance;

  await test('artalk: the built function starts on a read-only folder', async () => {
    const folder = project(program, with_port);
    const built = built_function(folder, {
      BINARY : './artalk',
      ARGS : 'server -w .',
      TARGET_PORT : 'auto',
      BUNDLE : 'artalk.yml',
      WARMPROXY_BACKGROUND_WORK : '5s',
      WARMPROXY_CDN_CACHE : '30d'
    });
    const { environment } = JSON.parse(
        fs.readFileSync(path.join(built, '.vc-config.json')));
    // Port 23366 may be taken here.
    instance = await on_vercel(built, './executable',
                               { ...environment, ...env, ATK_PORT : '0' });
    assert.ok(includes(await instance.ask(list), 'the first'));
  }, 600000);

  const script = await instance.ask({ path : '/dist/Artalk.js' });
  if (script.status === 404) {
    skip('artalk: on Vercel the CDN keeps scripts', 'it was built without its widget');
  } else {
    await test('artalk: on Vercel the CDN keeps scripts', () => {
      assert.equal(script.status, 200);
      assert.match(script.header('Cache-Control'), /s-maxage=2592000/);
    });
  }

  await test('artalk: on Vercel the mail leaves before the request ends', async () => {
    mail.mails.length = 0;
    const posted = await instance.ask(comment('with a mail'));
    assert.equal(posted.status, 200, posted.text);
    const read = await instance.ask(list);
    const read_end = await instance.end_of(read.id);
    const end = await instance.end_of(posted.id);
    const sent = mail.mails.find((each) => each.to.includes(admin.email));
    assert.ok(sent, `no mail: ${instance.running.output}`);
    assert.ok(posted.at <= sent.at && sent.at <= end.at,
              `answer ${posted.at}, mail ${sent.at}, end ${end.at}`);
    assert.ok(read_end.at <= end.at, 'only the comment is held open');
    assert.equal(instance.ends(posted.id), 1);
  });

  await test('artalk: on Vercel the visitor\'s address is the platform\'s', () => {
    assert.equal(comment_address(database, 'with a mail'), '192.0.2.7');
  });

  await test('artalk: on Vercel SIGTERM ends what is still held open', async () => {
    const posted = await instance.ask(comment('right before the end'));
    assert.equal(posted.status, 200);
    assert.equal(instance.ends(posted.id), 0);
    await instance.stop();
    await until('its end', () => instance.ends(posted.id) === 1);
  });
}

export default async function() {
  if (!process.env.ARTALK) {
    return skip('Artalk', 'no program given (ARTALK=path)');
  }
  const program = path.resolve(process.env.ARTALK);
  const [ database, cache, mail ] =
      await Promise.all([ postgres(), redis(), mail_server() ]);
  database.create('artalk');
  const env = variables(database, cache, mail);
  await plain(program, database, cache, env);
  await without_a_port(program, env);
  await as_function(program, database, mail, env);
}
