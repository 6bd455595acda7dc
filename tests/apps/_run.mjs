// Acceptance tests: warmproxy between real programs.
//   node tests/apps/_run.mjs [group...]
// APPS_PROXY=FILE tests another executable than build/warmproxy,
// APPS_ONLY=REGEX runs only the tests so named.

import { run } from './_support.mjs';

const all = [
  'caddy', 'prometheus', 'rclone', 'websocketd', 'npm', 'browser', 'status',
  'miniflux', 'waline', 'artalk'
];
const chosen = process.argv.length > 2 ? process.argv.slice(2) : all;

const groups = [];
for (const name of chosen) {
  groups.push([ name, (await import(`./_${name}.mjs`)).default ]);
}
await run(groups);
