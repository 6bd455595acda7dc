// Chromium as the client: the demo, the waiting page, CORS and CDN headers.
// APPS_SHOTS=DIRECTORY stores screenshots there.

import http from 'node:http';
import {
  ask, assert, browser, build, command_async, defer, fs, here, page, path,
  pause, scratch, start, test, until
} from './_support.mjs';

const demo = path.join(build, 'demo');

async function shot(page, name) {
  if (!process.env.APPS_SHOTS) { return; }
  fs.mkdirSync(process.env.APPS_SHOTS, { recursive : true });
  await page.screenshot(
      { path : path.join(process.env.APPS_SHOTS, `${name}.png`) });
}

/**
 * The demo behind a gate: it does not boot before open(), which may also make
 * it fail.
 */
async function gated(settings = {}) {
  const gate = path.join(scratch(), 'gate');
  const warm = await start({
    binary : '/bin/sh',
    args : [ '-c', 'until [ -e "$0" ]; do sleep 0.02; done; . "$0"', gate ],
    env : { DEMO_BOOT_MS : '0' }
  }, { waiting_page_after : '100ms', idle_stop : '0', ...settings });
  warm.url = `http://127.0.0.1:${warm.port}/`;
  warm.open = (action = `exec '${demo}'`) => {
    fs.writeFileSync(`${gate}.new`, `${action}\n`);
    fs.renameSync(`${gate}.new`, gate);
  };
  warm.shut = () => fs.rmSync(gate, { force : true });
  return warm;
}

const starting = (warm) => until(
    'it starts', async () => (await warm.status()).state === 'starting');

const is_demo = (page) => page.waitForSelector('h1:has-text("It is up")');
const bar = (page) => page.getByRole('progressbar');

// The seconds that the waiting page shows.
const seconds = (page) => page.evaluate(
    () => Number(/(\d+)\s*(s|秒)/.exec(document.body.innerText)[1]));

async function waiting(page, url) {
  const answer = await page.goto(url);
  assert.equal(answer.status(), 503);
  await bar(page).waitFor();
  return answer;
}

/** The contrast ratio of an element, as WCAG defines it. */
const contrast = (page, selector) => page.$eval(selector, (element) => {
  const rgb = (text) => text.match(/[\d.]+/g).map(Number);
  const light = (text) => {
    const [ r, g, b ] = rgb(text).map((c) => {
      const share = c / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  let ground = element;
  const see_through = (text) => /^transparent$|, 0\)$/.test(text);
  while (ground.parentElement &&
         see_through(getComputedStyle(ground).backgroundColor)) {
    ground = ground.parentElement;
  }
  const pair = [ getComputedStyle(element).color,
                 getComputedStyle(ground).backgroundColor ].map(light);
  return (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
});

async function closed(...pages) {
  for (const page of pages) {
    assert.deepEqual(page.trouble, []);
    await page.context().close();
  }
}

// ------------------------------------------------------------------- the demo

async function the_demo() {
  await test('demo: a cold start, its page and its forms', async () => {
    const warm = await start({ binary : demo });
    const view = await page();
    const answer = await view.goto(`http://127.0.0.1:${warm.port}/`);
    assert.equal(answer.status(), 200);
    await is_demo(view);
    await view.waitForFunction(
        () => /^Cold, \d+ ms$/.test(document.getElementById('visit').textContent));
    const timing = await view.evaluate(
        () => performance.getEntriesByType('navigation')[0]
                  .serverTiming.map(({ name, description, duration }) => ({
                    name, description, duration
                  })));
    const named = Object.fromEntries(timing.map((each) => [ each.name, each ]));
    assert.equal(named.warmproxy.description, 'cold start');
    assert.ok(named.warmproxy.duration >= 2000);
    assert.ok(named['warmproxy-spawn'].duration >= 0);
    assert.ok(named['warmproxy-ready'].duration >= 1900);
    assert.ok(named['warmproxy-spawn'].duration
              + named['warmproxy-ready'].duration
              <= named.warmproxy.duration + 1);
    await view.waitForFunction(
        () => /^Up for \d+/.test(document.getElementById('up').textContent));
    await view.waitForFunction(
        () => document.getElementById('beats').children.length >= 2);
    await view.fill('#talk input', 'hello ü');
    await view.click('#talk button');
    await view.waitForSelector('#echo li:has-text("hello ü")');
    await shot(view, 'demo');
    await view.reload();
    await view.waitForFunction(
        () => /^Warm, /.test(document.getElementById('visit').textContent));
    assert.equal(await view.evaluate(
        () => performance.getEntriesByType('navigation')[0].serverTiming.length),
                 0);
    await view.fill('input[name=name]', '小明 & co');
    await view.click('form[method=post] button');
    await view.waitForSelector('h1:has-text("Hello, 小明 & co.")');
    assert.equal((await warm.status()).starts, 1);
    await closed(view);
    await until('the stream is over',
                async () => (await warm.status()).in_flight === 0);
    await warm.stop();
  });

  await test('demo: WebSocket messages of every size', async () => {
    const warm = await start({ binary : demo, env : { DEMO_BOOT_MS : '0' } });
    const view = await page();
    await view.goto(`http://127.0.0.1:${warm.port}/`);
    const record = await view.evaluate(async () => {
      const socket = new WebSocket(new URL('/echo', location).href.replace('http', 'ws'));
      socket.binaryType = 'arraybuffer';
      const record = [];
      const next = () => new Promise((done, fail) => {
        socket.onmessage = (event) => done(event.data);
        socket.onerror = () => fail(new Error('WebSocket error'));
      });
      await new Promise((done) => socket.onopen = done);
      for (const text of ['', 'short', 'ü€𝄞', 'x'.repeat(1 << 20)]) {
        const answer = next();
        socket.send(text);
        record.push(await answer === text);
      }
      for (const length of [ 0, 125, 126, 65535, 65536, 3 << 20 ]) {
        const bytes = new Uint8Array(length).map((_, i) => i * 31 >> 3);
        const answer = next();
        socket.send(bytes);
        const back = new Uint8Array(await answer);
        record.push(back.length === length && back.every((b, i) => b === bytes[i]));
      }
      const end = new Promise((done) => socket.onclose = done);
      socket.close(4000, 'enough');
      const { code, wasClean } = await end;
      return { record, code, wasClean };
    });
    assert.deepEqual(record, {
      record : Array(10).fill(true),
      code : 4000,
      wasClean : true
    });
    await closed(view);
    await warm.stop();
  });

  await test('demo: WebSocket and event stream as the first request', async () => {
    const elsewhere = await origin();
    for (const script of [
      (url) => new Promise((done, fail) => {
        const socket = new WebSocket(`${url}echo`.replace('http', 'ws'));
        socket.onopen = () => socket.send('early');
        socket.onmessage = ({ data }) => { socket.close(); done(data); };
        socket.onerror = () => fail(new Error('refused'));
      }),
      (url) => new Promise((done, fail) => {
        const events = new EventSource(`${url}events`);
        events.onmessage = () => { events.close(); done('early'); };
        events.onerror = () => fail(new Error('refused'));
      })
    ]) {
      const warm = await gated({ cors_origins : elsewhere });
      const view = await page();
      await view.goto(elsewhere);
      const got = view.evaluate(script, warm.url);
      got.catch(() => {});
      await starting(warm);
      warm.open();
      assert.equal(await got, 'early');
      await closed(view);
      await warm.stop();
    }
  });
}

// ----------------------------------------------------------- the waiting page

async function the_waiting_page() {
  await test('waiting page: shown during a cold start, then replaced by the target',
             async () => {
    const warm = await gated();
    const view = await page();
    const asked = [];
    let open = 0;
    view.on('request', (request) => { asked.push(request.url()); open++; });
    view.on('requestfinished', () => open--);
    view.on('requestfailed', () => open--);
    const url = `${warm.url}?x=1&y=%2F%20#part-2`;
    const answer = await waiting(view, url);
    const headers = answer.headers();
    assert.match(headers['retry-after'], /^\d+$/);
    assert.equal(headers['cache-control'], 'no-store');
    assert.match(headers['content-type'], /^text\/html; *charset=utf-8$/i);
    // A platform may freeze an instance that has no request in progress.
    await until('one request is kept open', () => open === 1);
    const first = await seconds(view);
    await until('it says for how long', async () => await seconds(view) > first);
    const history = await view.evaluate(() => window.history.length);
    await shot(view, 'waiting');
    warm.open();
    await is_demo(view);
    assert.equal(view.url(), url);
    assert.equal(await view.evaluate(() => window.history.length), history);
    assert.equal(await view.evaluate(
        () => performance.getEntriesByType('navigation')[0].responseStatus), 200);
    assert.ok(asked.every((each) => each.startsWith(warm.url)
                                    || each.startsWith('data:')),
              asked.join('\n'));
    assert.equal((await warm.status()).starts, 1);
    await closed(view);
    await warm.stop();
  });

  await test('waiting page: a later visitor sees the time since the start began', async () => {
    const warm = await gated();
    const first = await page();
    await waiting(first, warm.url);
    const so_far = await until('3 seconds', async () => {
      const said = await seconds(first);
      return said >= 3 && said;
    });
    const second = await page();
    await waiting(second, warm.url);
    const said = await seconds(second);
    assert.ok(said >= so_far - 1, `${said} s instead of ${so_far} s`);
    warm.open();
    await is_demo(first);
    await is_demo(second);
    await closed(first, second);
    await warm.stop();
  });

  await test('waiting page: loads nothing from elsewhere', async () => {
    const warm = await gated();
    const view = await page();
    const answer = await waiting(view, warm.url);
    const source = await answer.text();
    assert.doesNotMatch(source, /(src|href)=(?!"data:)|url\(|@import|https?:\/\//i);
    assert.ok(source.length < 8000, `${source.length} bytes`);
    await closed(view);
    await warm.stop();
  });

  await test('waiting page: reloads without JavaScript', async () => {
    // With a fragment, navigating to the same URL would not reload the page.
    for (const address of ['', 'a/b?x=1&y=%2F%20"\'<', '?x=1#part-2']) {
      const warm = await gated();
      const view = await page({ javaScriptEnabled : false });
      let asked = 0;
      view.on('response', (answer) => asked += answer.status() === 503);
      await waiting(view, warm.url + address);
      const before = view.url();
      await until('it asks again by itself', () => asked > 1);
      assert.equal(view.url().split('#')[0], before.split('#')[0]);
      warm.open();
      const answer = await view.waitForResponse((each) => each.status() !== 503);
      assert.equal(answer.url(), before.split('#')[0]);
      await closed(view);
      await warm.stop();
    }
  });

  await test('waiting page: a download ends the wait', async () => {
    const warm = await gated();
    const view = await page();
    await waiting(view, warm.url);
    const download = view.waitForEvent('download');
    const program = `require('http').createServer((request, response) => {
      response.setHeader('Content-Disposition', 'attachment');
      response.end('file');
    }).listen(process.env.PORT, '127.0.0.1')`;
    warm.open(`exec '${process.execPath}' -e "${program}"`);
    await download;
    await view.waitForSelector('h1:has-text("The site has started")');
    assert.equal(await bar(view).isVisible(), false);
    assert.equal(await view.getByRole('button').isVisible(), false);
    await closed(view);
    await warm.stop();
  });

  await test('waiting page: not shown while the target is up', async () => {
    const warm = await gated({ waiting_page_after : '1ms' });
    warm.open();
    assert.equal((await ask(warm.port)).status, 200);
    const view = await page();
    for (let i = 0; i < 20; i++) {
      assert.equal((await view.goto(`${warm.url}?${i}`)).status(), 200);
    }
    await closed(view);
    await warm.stop();
  });

  await test('waiting page: not shown before waiting_page_after', async () => {
    for (const after of ['45s', '0']) {
      const warm = await gated({ waiting_page_after : after });
      const view = await page();
      const visit = view.goto(warm.url);
      await starting(warm);
      await pause(300);
      warm.open();
      assert.equal((await visit).status(), 200);
      await closed(view);
      await warm.stop();
    }
  });

  await test('waiting page: not shown to fetch(), XMLHttpRequest and subresources', async () => {
    const elsewhere = await origin();
    const warm = await gated({ cors_origins : '*' });
    const view = await page();
    const statuses = [];
    view.on('response', (answer) => {
      if (answer.url().startsWith(warm.url)) { statuses.push(answer.status()); }
    });
    await view.goto(elsewhere);
    const got = view.evaluate(async (url) => {
      // Distinct URLs, since a browser serializes requests for the same one.
      const bodies = [
        fetch(url),
        fetch(`${url}?html`, { headers : { Accept : 'text/html' } }),
        fetch(`${url}hello`, { method : 'POST', body : 'name=x' }),
        new Promise((done, fail) => {
          const old = new XMLHttpRequest();
          old.open('GET', `${url}?xhr`);
          old.setRequestHeader('Accept', 'text/html,*/*');
          old.onload = () => done(old);
          old.onerror = fail;
          old.send();
        })
      ];
      const element = (tag, attributes) => new Promise((done, fail) => {
        const made = Object.assign(document.createElement(tag), attributes);
        made.onload = () => done({ status : 200 });
        made.onerror = fail;
        document.head.append(made);
      });
      bodies.push(element('script', { src : `${url}app.js?as-script` }));
      bodies.push(element('link', { href : `${url}style.css`, rel : 'stylesheet' }));
      return (await Promise.all(bodies)).map(({ status }) => status);
    }, warm.url);
    got.catch(() => {});
    await starting(warm);
    await pause(300);
    assert.deepEqual(statuses, []);
    warm.open();
    assert.deepEqual(await got, Array(6).fill(200));
    assert.ok(statuses.every((status) => status === 200), statuses.join());
    await view.context().close();
    await warm.stop();
  });

  await test('waiting page: not shown to a posted form', async () => {
    const warm = await gated();
    const view = await page();
    await view.setContent(`<form method=post action="${warm.url}hello">
      <input name=name value=Eve><button>Go</button></form>`);
    const answer = view.waitForResponse(`${warm.url}hello`);
    await view.click('button', { noWaitAfter : true });
    await starting(warm);
    await pause(300);
    warm.open();
    assert.equal((await answer).status(), 200);
    await view.waitForSelector('h1:has-text("Hello, Eve.")');
    await closed(view);
    await warm.stop();
  });

  await test('waiting page: navigations over plain http, but not Accept alone',
             async () => {
    const warm = await gated();
    const accept = [ 'Accept', 'text/html,*/*;q=0.5' ];
    let feed_reader;
    const asked = ask(warm.port, { headers : [ accept ] });
    asked.then((answer) => feed_reader = answer, () => {});
    const browser_answer = await ask(warm.port, {
      headers : [ accept, [ 'Upgrade-Insecure-Requests', '1' ] ]
    });
    assert.equal(browser_answer.status, 503);
    assert.match(browser_answer.text, /progressbar/);
    // Moves on even where a Content-Security-Policy forbids the script.
    assert.match(browser_answer.header('Refresh'), /^\d+/);
    assert.equal(feed_reader, undefined);
    warm.open();
    assert.equal((await asked).status, 200);
    await warm.stop();
  });

  await test('waiting page: not shown to curl', async () => {
    const warm = await gated();
    const asked = [
      command_async('curl', [ '-sS', '-w', ' %{http_code}', warm.url ]),
      command_async('curl', [ '-sS', '-w', ' %{http_code}', '-H',
                              'Accept: application/json', warm.url ]),
      command_async('curl', [ '-sSI', '-w', ' %{http_code}', '-H',
                              'Accept: text/html', warm.url ])
    ];
    await starting(warm);
    await pause(300);
    warm.open();
    for (const each of asked) {
      const { stdout, stderr } = await each;
      assert.match(stdout, /[^5]\d\d$/, stderr);
      assert.doesNotMatch(stdout, /progressbar/);
    }
    await warm.stop();
  });

  await test('waiting page: shown in a frame, and to a second visitor', async () => {
    const warm = await gated();
    const frame = await page();
    await frame.setContent(`<iframe src="${warm.url}"></iframe>`);
    await frame.frameLocator('iframe').getByRole('progressbar').waitFor();
    const second = await page({ locale : 'zh-CN' });
    await waiting(second, warm.url);
    warm.open();
    await frame.frameLocator('iframe').locator('h1:has-text("It is up")').waitFor();
    await is_demo(second);
    assert.equal((await warm.status()).starts, 1);
    await closed(frame, second);
    await warm.stop();
  });

  await test('waiting page: a failed start is reported with a button to retry', async () => {
    const warm = await gated();
    const view = await page();
    const url = `${warm.url}?a=b#c`;
    await waiting(view, url);
    warm.open('exit 3');
    const button = view.getByRole('button');
    await button.waitFor();
    const text = await view.innerText('body');
    assert.match(text, /\b3\b/);
    assert.doesNotMatch(text, /warmproxy: |gate/);
    assert.equal(await bar(view).count(), 0);
    assert.match(await view.innerText('[role=status], [aria-live]'), /\b3\b/);
    await shot(view, 'failed-meanwhile');
    warm.shut();
    await button.click();
    await bar(view).waitFor();
    warm.open();
    await is_demo(view);
    assert.equal(view.url(), url);
    await closed(view);
    await warm.stop();
  });

  await test('waiting page: an immediate failure is a page with a way to retry',
             async () => {
    for (const javaScriptEnabled of [ true, false ]) {
      const warm = await gated({ waiting_page_after : '20s' });
      warm.open('exit 3');
      const view = await page({ javaScriptEnabled });
      const answer = await view.goto(`${warm.url}?a=b`);
      assert.equal(answer.status(), 502);
      assert.equal(answer.headers()['cache-control'], 'no-store');
      assert.equal(await bar(view).count(), 0);
      assert.match(await view.innerText('body'), /\b3\b/);
      await shot(view, `failed-at-once${javaScriptEnabled ? '' : '-no-script'}`);
      warm.open();
      // During the back-off after a failure the error page comes again.
      await until('it is up', async () => {
        if (await view.locator('h1:has-text("It is up")').count()) { return true; }
        const again = view.getByRole('button', { name : 'Try again' })
                          .or(view.getByRole('link', { name : 'Try again' }));
        await Promise.all([ view.waitForEvent('load'), again.click() ]);
        return false;
      });
      assert.equal(view.url(), `${warm.url}?a=b`);
      await closed(view);
      await warm.stop();
    }
  });

  await test('waiting page: a start beyond startup_timeout is reported', async () => {
    const warm = await gated({ startup_timeout : '1s' });
    const view = await page();
    assert.equal((await view.goto(warm.url)).status(), 503);
    await view.getByRole('button').waitFor();
    await shot(view, 'failed-too-long');
    assert.equal(await bar(view).count(), 0);
    await closed(view);
    await warm.stop();
  });

  await test('waiting page: English and Chinese', async () => {
    const warm = await gated();
    for (const [locale, language] of [
           [ 'en-US', 'en' ], [ 'en-GB', 'en' ], [ 'de-DE', 'en' ],
           [ 'zh-CN', 'zh' ], [ 'zh-TW', 'zh' ], [ 'zh', 'zh' ]
         ]) {
      const view = await page({ locale });
      await waiting(view, warm.url);
      assert.match(await view.getAttribute('html', 'lang'),
                   new RegExp(`^${language}\\b`));
      const text = await view.innerText('body');
      assert.equal(/[\u4e00-\u9fff]/.test(text), language === 'zh', text);
      assert.equal(/[\u4e00-\u9fff]/.test(await view.title()), language === 'zh');
      await shot(view, `waiting-${locale}`);
      await closed(view);
    }
    const chinese = await page({ locale : 'zh-CN' });
    await waiting(chinese, warm.url);
    warm.open('exit 3');
    await chinese.getByRole('button', { name : '重试' }).waitFor();
    assert.match(await chinese.innerText('h1'), /[\u4e00-\u9fff]/);
    await shot(chinese, 'failed-zh-CN');
    await closed(chinese);
    await warm.stop();
  });

  await test('waiting page: contrast in light and dark', async () => {
    const warm = await gated();
    const grounds = [];
    for (const colorScheme of ['light', 'dark']) {
      const view = await page({ colorScheme });
      await waiting(view, warm.url);
      for (const what of ['h1', 'p', 'small']) {
        const found = await contrast(view, what);
        assert.ok(found >= 4.5, `${colorScheme} ${what}: ${found}`);
      }
      grounds.push(await view.$eval(
          'body', (body) => getComputedStyle(body).backgroundColor));
      await shot(view, `waiting-${colorScheme}`);
      await closed(view);
    }
    const brightness = (text) =>
        text.match(/\d+/g).reduce((sum, c) => sum + Number(c), 0);
    assert.ok(brightness(grounds[0]) > 600, grounds[0]);
    assert.ok(brightness(grounds[1]) < 150, grounds[1]);
    const failed = [ await page({ colorScheme : 'light' }),
                     await page({ colorScheme : 'dark' }) ];
    for (const view of failed) { await waiting(view, warm.url); }
    warm.open('exit 3');
    for (const view of failed) {
      await view.getByRole('button').waitFor();
      const found = await contrast(view, 'button:visible');
      await shot(view, `failed-${failed.indexOf(view) ? 'dark' : 'light'}`);
      assert.ok(found >= 4.5, `button: ${found}`);
    }
    await closed(...failed);
    await warm.stop();
  });

  await test('waiting page: respects prefers-reduced-motion', async () => {
    const warm = await gated();
    for (const reducedMotion of ['no-preference', 'reduce']) {
      const view = await page({ reducedMotion });
      await waiting(view, warm.url);
      const moving = await view.evaluate(() => document.getAnimations().filter(
          (each) => each.playState === 'running').length);
      assert.equal(moving > 0, reducedMotion !== 'reduce');
      await shot(view, `waiting-motion-${reducedMotion}`);
      await closed(view);
    }
    await warm.stop();
  });

  await test('waiting page: forced colors', async () => {
    const warm = await gated();
    const view = await page({ forcedColors : 'active' });
    await waiting(view, warm.url);
    const drawn = await view.$eval('[role=progressbar]', (bar) => {
      const { backgroundImage, borderTopWidth } = getComputedStyle(bar);
      return backgroundImage !== 'none' || parseFloat(borderTopWidth) > 0;
    });
    await shot(view, 'waiting-forced-colors');
    assert.ok(drawn, 'the bar is invisible');
    await closed(view);
    await warm.stop();
  });

  await test('waiting page: fits small screens and large text', async () => {
    const warm = await gated();
    for (const [name, viewport, letters] of [
           [ 'phone', { width : 360, height : 640 }, 1 ],
           [ 'phone-across', { width : 640, height : 320 }, 1 ],
           [ 'phone-small', { width : 280, height : 480 }, 1 ],
           [ 'phone-large-letters', { width : 360, height : 640 }, 2 ]
         ]) {
      const view = await page({
        viewport,
        isMobile : true,
        hasTouch : true,
        deviceScaleFactor : 2
      });
      await waiting(view, warm.url);
      if (letters !== 1) {
        await view.addStyleTag({ content : `html { font-size: ${letters * 100}% }` });
      }
      const seen = await view.evaluate(() => ({
        wide : document.documentElement.scrollWidth - innerWidth,
        high : document.documentElement.scrollHeight - innerHeight,
        letters : parseFloat(getComputedStyle(document.querySelector('p')).fontSize)
      }));
      assert.ok(seen.wide <= 0, `${name}: ${seen.wide} too wide`);
      if (letters === 1) { assert.ok(seen.high <= 0, `${name}: ${seen.high} too high`); }
      assert.ok(seen.letters >= 15 * letters, `${name}: ${seen.letters}`);
      await shot(view, `waiting-${name}`);
      await closed(view);
    }
    await warm.stop();
  });

  await test('waiting page: screen readers and keyboard', async () => {
    const warm = await gated();
    const view = await page();
    await waiting(view, warm.url);
    assert.ok(await view.title());
    await view.getByRole('progressbar', { name : /\w/ }).waitFor();
    await view.getByRole('heading', { level : 1 }).waitFor();
    const live = view.locator('[role=status], [aria-live=polite]').first();
    const before = await live.innerText();
    // The counter is outside the live region, or it would be read every second.
    assert.doesNotMatch(before, /\d+ s/);
    warm.open('exit 3');
    await view.getByRole('button', { name : 'Try again' }).waitFor();
    assert.notEqual(await live.innerText(), before);
    await view.keyboard.press('Tab');
    assert.equal(await view.evaluate(() => document.activeElement.tagName), 'BUTTON');
    assert.ok(await view.evaluate(() => parseFloat(
        getComputedStyle(document.activeElement).outlineWidth)) >= 2);
    await closed(view);
    await warm.stop();
  });

  await test('waiting page: survives a lost network connection', async () => {
    const warm = await gated();
    const view = await page();
    await waiting(view, warm.url);
    await view.context().setOffline(true);
    await pause(1500);
    assert.equal(await bar(view).count(), 1);
    await view.context().setOffline(false);
    warm.open();
    await is_demo(view);
    await closed(view);
    await warm.stop();
  });
}

// ---------------------------------------------------------------- two origins

/** Another origin: a server that answers everything with an empty page. */
async function origin() {
  const server = http.createServer((request, response) => {
    response.setHeader('Content-Type', 'text/html');
    response.end('<!doctype html><title>elsewhere</title>');
  });
  await new Promise((done) => server.listen(0, '127.0.0.1', done));
  defer(() => { server.closeAllConnections?.(); server.close(); });
  return `http://127.0.0.1:${server.address().port}`;
}

const application = (files = '.') => ({
  binary : process.execPath,
  args : [ path.join(here, '_target.mjs') ],
  env : { APPS_BUILD : build, FILES : files }
});

/** fetch() in a page: what the script can read of the response. */
const fetched = (page, url, init = {}) => page.evaluate(
    ([ url, init ]) => fetch(url, init).then(
        async (answer) => ({
          status : answer.status,
          headers : Object.fromEntries(answer.headers),
          text : await answer.text()
        }),
        (error) => ({ error : error.name })),
    [ url, init ]);

async function two_origins() {
  const ours = await origin();
  const theirs = await origin();
  const warm = await start(application(), { cors_origins : ours });
  const url = `http://127.0.0.1:${warm.port}`;
  const here = await page();
  const there = await page();
  await here.goto(ours);
  await there.goto(theirs);
  const starts = async () => (await warm.status()).starts;

  await test('cors: a preflight does not start the target', async () => {
    const answer = await ask(warm.port, {
      method : 'OPTIONS',
      path : '/seen',
      headers : [ [ 'Origin', ours ],
                  [ 'Access-Control-Request-Method', 'PUT' ],
                  [ 'Access-Control-Request-Headers', 'x-own,content-type' ] ]
    });
    assert.equal(answer.status, 204);
    assert.equal(answer.header('Access-Control-Allow-Origin'), ours);
    assert.match(answer.header('Access-Control-Allow-Methods'), /PUT/);
    assert.match(answer.header('Access-Control-Allow-Headers'), /x-own/);
    assert.match(answer.header('Vary'), /Origin/);
    assert.equal(await starts(), 0);
    const refused = await fetched(there, `${url}/seen`, { method : 'PUT' });
    assert.equal(refused.error, 'TypeError');
    assert.equal(await starts(), 0);
  });

  await test('cors: a preflighted request of an allowed origin', async () => {
    const init = {
      method : 'PUT',
      body : '{"a":1}',
      headers : { 'Content-Type' : 'application/json', 'X-Own' : 'yes' }
    };
    const got = await fetched(here, `${url}/seen`, init);
    assert.equal(got.status, 200);
    const arrived = JSON.parse(got.text);
    assert.equal(arrived.method, 'PUT');
    assert.equal(arrived.length, 7);
    assert.ok(arrived.headers.includes('yes'));
    const before = (await warm.status()).requests;
    assert.equal((await fetched(there, `${url}/seen`, init)).error, 'TypeError');
    assert.equal((await warm.status()).requests, before);
    assert.equal((await fetched(here, `${url}/seen`, { method : 'DELETE' })).status,
                 200);
  });

  await test('cors: a simple request', async () => {
    const got = await fetched(here, `${url}/`);
    assert.equal(got.status, 200);
    assert.match(got.text, /home/);
    assert.equal((await fetched(there, `${url}/`)).error, 'TypeError');
    assert.equal((await fetched(here, `${url}/nowhere`)).status, 404);
    const form = await fetched(here, `${url}/json`, {
      method : 'POST',
      headers : { 'Content-Type' : 'application/json' },
      body : '{"b":2}'
    });
    assert.deepEqual(JSON.parse(form.text), { b : 2 });
  });

  await test('cors: credentials', async () => {
    const login = await fetched(here, `${url}/login`, {
      method : 'POST',
      credentials : 'include',
      headers : { 'Content-Type' : 'application/x-www-form-urlencoded' },
      body : 'name=Ada'
    });
    assert.equal(login.status, 200); // after the redirect to /me
    assert.deepEqual(JSON.parse(login.text), { name : 'Ada' });
    const me = await fetched(here, `${url}/me`, { credentials : 'include' });
    assert.deepEqual(JSON.parse(me.text), { name : 'Ada' });
    assert.equal((await fetched(here, `${url}/me`)).status, 401);
    assert.equal((await fetched(there, `${url}/me`, { credentials : 'include' })).error,
                 'TypeError');
    const answer = await ask(
        warm.port, { path : '/me', headers : [ [ 'Origin', ours ] ] });
    assert.equal(answer.header('Access-Control-Allow-Credentials'), 'true');
    assert.match(answer.all('Vary').join(), /Origin/);
  });

  await test('cors: replaces the target\'s own headers', async () => {
    const got = await fetched(here, `${url}/own-cors`);
    assert.equal(got.status, 200);
    const answer = await ask(
        warm.port, { path : '/own-cors', headers : [ [ 'Origin', ours ] ] });
    assert.deepEqual(answer.all('Access-Control-Allow-Origin'), [ ours ]);
    const none = await ask(
        warm.port, { path : '/own-cors', headers : [ [ 'Origin', theirs ] ] });
    assert.deepEqual(none.all('Access-Control-Allow-Origin'), []);
  });

  await test('cors: the page can read our error responses',
             async () => {
    const broken = await start({ binary : '/bin/false' },
                               { cors_origins : ours });
    const got = await fetched(here, `http://127.0.0.1:${broken.port}/`);
    assert.equal(got.status, 502);
    assert.match(got.text, /^warmproxy: /);
    await broken.stop();
  });

  await test('cors: any origin, with and without credentials', async () => {
    const open = await start(application(), { cors_origins : '*' });
    const url = `http://127.0.0.1:${open.port}`;
    assert.equal((await fetched(there, `${url}/`)).status, 200);
    assert.equal((await fetched(there, `${url}/`, { credentials : 'include' })).status,
                 200);
    assert.equal((await fetched(there, `${url}/seen`, {
                   method : 'PATCH',
                   credentials : 'include',
                   headers : { 'X-Own' : '1' },
                   body : 'x'
                 })).status,
                 200);
    await open.stop();
  });

  await test('cors: without cors_origins the target decides', async () => {
    const plain = await start(application());
    const url = `http://127.0.0.1:${plain.port}`;
    assert.equal((await fetched(here, `${url}/`)).error, 'TypeError');
    assert.equal((await fetched(here, `${url}/own-cors`)).error, 'TypeError');
    const own = await ask(
        plain.port, { path : '/own-cors', headers : [ [ 'Origin', ours ] ] });
    assert.deepEqual(own.all('Access-Control-Allow-Origin'),
                     [ 'https://only.example' ]);
    await plain.stop();
  });

  await closed(here, there);
}

async function caches() {
  const files = scratch();
  fs.writeFileSync(path.join(files, 'app.js'), 'window.ran = (window.ran || 0) + 1;');
  fs.writeFileSync(path.join(files, 'style.css'), 'body { color: rgb(1, 2, 3) }');
  fs.writeFileSync(path.join(files, 'page.html'), '<!doctype html><p>page');
  const ours = await origin();
  const warm = await start(application(files),
                           { cdn_cache : '1h', cors_origins : ours });
  const url = `http://127.0.0.1:${warm.port}`;

  await test('cdn cache: scripts and style sheets only',
             async () => {
    const kept = [ 'public, s-maxage=3600', 'public, max-age=3600',
                   'public, max-age=3600' ];
    await ask(warm.port);
    for (const [path, expected, method] of [
           [ '/files/app.js', kept ],
           [ '/files/app.js?v=2', kept ],
           [ '/files/style.css', kept, 'HEAD' ],
           [ '/script-by-type', kept ],
           [ '/files/page.html', null ],
           [ '/files/none.js', null ],
           [ '/script-by-type?cache=no-store', null ],
           [ '/script-by-type?cache=private,max-age=1', null ],
           [ '/script-by-type?cookie=1', null ],
           [ '/script-by-type', null, 'POST' ]
         ]) {
      const request = { path, method };
      const direct = await ask(warm.target_port, request);
      const answer = await ask(warm.port, request);
      const found = [
        'Cache-Control', 'CDN-Cache-Control', 'Vercel-CDN-Cache-Control'
      ].map((name) => answer.all(name));
      assert.deepEqual(found, expected
          ? expected.map((value) => [ value ])
          : [ direct.all('Cache-Control'), [], [] ], path);
    }
  });

  await test('cdn cache: a 304 repeats the header', async () => {
    const whole = await ask(warm.port, { path : '/files/app.js' });
    const answer = await ask(warm.port, {
      path : '/files/app.js',
      headers : [ [ 'If-None-Match', whole.header('ETag') ] ]
    });
    assert.equal(answer.status, 304);
    assert.deepEqual(answer.all('Cache-Control'), whole.all('Cache-Control'));
  });

  await test('cdn cache: a page of another origin loads them', async () => {
    const view = await page();
    await view.goto(ours);
    await view.evaluate(async (url) => {
      const load = (tag, attributes) => new Promise((done, fail) => {
        const made = Object.assign(document.createElement(tag), attributes);
        made.onload = done;
        made.onerror = () => fail(new Error(`${tag} failed`));
        document.head.append(made);
      });
      await load('script', { src : `${url}/files/app.js` });
      await load('script', {
        src : `${url}/files/app.js?module`,
        type : 'module',
        crossOrigin : 'use-credentials'
      });
      await load('link', {
        rel : 'stylesheet',
        href : `${url}/files/style.css`,
        crossOrigin : 'anonymous'
      });
    }, url);
    assert.equal(await view.evaluate(() => window.ran), 2);
    assert.equal(await view.$eval('body', (body) => getComputedStyle(body).color),
                 'rgb(1, 2, 3)');
    const got = await fetched(view, `${url}/files/app.js`);
    assert.equal(got.headers['cache-control'], 'public, s-maxage=3600');
    await closed(view);
  });
}

export default async function() {
  await browser();
  await the_demo();
  await the_waiting_page();
  await two_origins();
  await caches();
}
