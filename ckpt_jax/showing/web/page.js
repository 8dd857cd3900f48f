'use strict';
const page = JSON.parse(document.getElementById('data').textContent);
const values = page.values;
const byPath = new Map(values.map(value => [value.path, value]));
const at = id => document.getElementById(id);
const SVG = 'http://www.w3.org/2000/svg';

function made(name, attributes = {}, ...inside) {
  const found = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) found.setAttribute(key, value);
  found.append(...inside);
  return found;
}
function drawn(name, attributes = {}, ...inside) {
  const found = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) found.setAttribute(key, value);
  found.append(...inside);
  return found;
}

// --- light and dark, colours -------------------------------------------------------------

at('theme').onclick = () => {
  const root = document.documentElement;
  const isDark = root.dataset.theme
    ? root.dataset.theme === 'dark' : matchMedia('(prefers-color-scheme: dark)').matches;
  root.dataset.theme = isDark ? 'light' : 'dark';
};
for (const button of document.querySelectorAll('.choice button')) {
  button.onclick = () => {
    for (const each of document.querySelectorAll('.choice button'))
      each.setAttribute('aria-pressed', each === button);
    at('map').dataset.by = at('legend').dataset.by = button.dataset.by;
  };
}

// --- the map -----------------------------------------------------------------------------

const cells = new Map([...document.querySelectorAll('#map g.value')].map(g => [g.dataset.path, g]));
const tip = at('tip');
function hint(event, text) {
  tip.hidden = false;
  tip.textContent = text;
  const {width, height} = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - width - 8))}px`;
  const below = event.clientY + 18;
  tip.style.top = `${below + height > innerHeight ? event.clientY - height - 10 : below}px`;
}
at('map').onmousemove = event => {
  const g = event.target.closest('g.value');
  if (!g) { tip.hidden = true; return; }
  const value = byPath.get(g.dataset.path);
  const share = (100 * value.nbytes / page.nbytes).toPrecision(2);
  hint(event, [`${value.path}: ${value.type}, ${value.size} (${Number(share)} %)`,
               value.sharding, value.note].filter(Boolean).join(', '));
};
at('map').onmouseleave = () => { tip.hidden = true; };
at('map').onclick = event => {
  const g = event.target.closest('g.value');
  if (g) choose(g.dataset.path, true);
};

// --- the table ---------------------------------------------------------------------------

const search = at('search'), body = at('rows');
let order = ['path', 1], limit = 300, chosen = null;
const position = new Map(values.map((value, number) => [value, number]));

function hits() {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  const found = values.filter(value => {
    const text = `${value.path} ${value.type} ${value.note}`.toLowerCase();
    return words.every(word => text.includes(word));
  });
  const [by, sign] = order;
  const rank = value => by === 'path' ? position.get(value) : value.nbytes;
  return found.sort((a, b) => sign * (rank(a) - rank(b)) || position.get(a) - position.get(b));
}
function fill() {
  const found = hits();
  body.replaceChildren(...found.slice(0, limit).map(value => {
    const row = made('tr', {tabindex: 0});
    row.dataset.path = value.path;
    row.classList.toggle('chosen', value.path === chosen);
    for (const name of ['path', 'type', 'size', 'sharding'])
      row.append(made('td', name === 'size' ? {class: 'number'} : {}, value[name] || ''));
    // A path may be broken after a slash.
    row.firstChild.replaceChildren(...(value.path || '(root)').split(/(?<=\/)/).flatMap(part => [part, made('wbr')]));
    if (value.note) row.firstChild.append(made('div', {class: 'note'}, value.note));
    return row;
  }));
  at('shown').textContent = found.length === values.length
    ? `${values.length.toLocaleString('en')} paths`
    : `${found.length.toLocaleString('en')} of ${values.length.toLocaleString('en')} paths`;
  at('nothing').hidden = found.length > 0;
  at('more').hidden = found.length <= limit;
  at('more').textContent = `show ${Math.min(3000, found.length - limit)} more`;
  const paths = new Set(found.map(value => value.path));
  for (const [path, g] of cells) g.classList.toggle('out', !paths.has(path));
}
search.oninput = () => { limit = 300; fill(); };
at('more').onclick = () => { limit += 3000; fill(); };
body.onclick = event => choose(event.target.closest('tr').dataset.path, false);
body.onkeydown = event => {
  if (event.key === 'Enter') choose(event.target.closest('tr').dataset.path, false);
};
for (const head of document.querySelectorAll('th[data-sort]')) {
  head.firstChild.onclick = () => {
    const by = head.dataset.sort;
    order = [by, order[0] === by ? -order[1] : by === 'nbytes' ? -1 : 1];
    for (const each of document.querySelectorAll('th[data-sort]')) each.removeAttribute('aria-sort');
    head.setAttribute('aria-sort', order[1] > 0 ? 'ascending' : 'descending');
    fill();
  };
}
addEventListener('keydown', event => {
  if (event.key === '/' && document.activeElement !== search) {
    event.preventDefault(); search.focus();
  }
  if (event.key === 'Escape' && document.activeElement === search) {
    search.value = ''; fill(); search.blur();
  }
});

function choose(path, andScroll) {
  chosen = path;
  const number = andScroll ? hits().findIndex(value => value.path === path) : -1;
  if (number >= limit) { limit = number + 50; fill(); }
  for (const [other, g] of cells) g.classList.toggle('chosen', other === path);
  let row = null;
  for (const each of body.children) {
    each.classList.toggle('chosen', each.dataset.path === path);
    if (each.dataset.path === path) row = each;
  }
  if (row && andScroll) {  // only the table moves, not the page
    const box = row.closest('.scroll');
    box.scrollTop = row.offsetTop - box.offsetTop - box.clientHeight / 3;
  }
  detail(byPath.get(path));
}

// --- the chosen value --------------------------------------------------------------------

function detail(value) {
  const facts = made('dl');
  const fact = (name, text) => { if (text) facts.append(made('dt', {}, name), made('dd', {}, text)); };
  fact('type', value.type);
  fact('size', value.size);
  fact('sharding', value.sharding);
  fact('note', value.note);
  const panel = at('detail');
  panel.replaceChildren(made('h3', {}, value.path || '(root)'), facts);
  if (value.layout) shards(panel, value.layout);
  else panel.append(made('p', {class: 'dim'}, value.sharding ? 'Each of its devices had all of it.'
    : 'It lay in one piece, or the checkpoint does not say how.'));
}

// The boxes of an array, and the positions of the mesh that hold them, in the same colours.
function shards(panel, {shape, mesh, splits}) {
  const sizes = new Map(mesh);
  const parts = splits.map(names => names.reduce((n, name) => n * sizes.get(name), 1));
  const split = parts.map((n, axis) => axis).filter(axis => parts[axis] > 1);
  const [down, across] = split.length > 1 ? split : shape.length > 1 && split[0] > 0
    ? [-1, split[0]] : [split[0] ?? -1, -1];
  const total = mesh.reduce((n, [, size]) => n * size, 1);
  const rows = down < 0 ? 1 : parts[down], columns = across < 0 ? 1 : parts[across];
  const others = split.filter(axis => axis !== down && axis !== across);

  function piece(number) {  // of the device at a position of the mesh
    const place = new Map();
    let stride = total;
    for (const [name, size] of mesh) { stride /= size; place.set(name, Math.floor(number / stride) % size); }
    const index = splits.map(names => names.reduce((k, name) => k * sizes.get(name) + place.get(name), 0));
    return {place, index};
  }
  const range = (axis, k) => {
    const step = Math.ceil(shape[axis] / parts[axis]);
    return `${Math.min(k * step, shape[axis])}:${Math.min((k + 1) * step, shape[axis])}`;
  };
  const boxOf = index => `[${shape.map((n, axis) => range(axis, index[axis])).join(', ')}]`;
  const slot = index => (down < 0 ? 0 : index[down]) * columns + (across < 0 ? 0 : index[across]);
  const hue = k => `hsl(${Math.round(205 + 360 * k / (rows * columns)) % 360} 62% 54%)`;

  const positions = Array.from({length: Math.min(total, 4096)}, (_, number) => ({number, ...piece(number)}));
  const held = made('p', {id: 'held', class: 'dim'}, 'Point at a box to see which devices held it.');
  const lit = new Map();
  function link(g, k, text) {
    (lit.get(k) ?? lit.set(k, []).get(k)).push(g);
    g.onmouseenter = () => { for (const each of lit.get(k)) each.classList.add('lit'); held.textContent = text; };
    g.onmouseleave = () => { for (const each of lit.get(k)) each.classList.remove('lit'); };
  }
  const names = position => [...position.place].map(([name, k]) => `${name}=${k}`).join(', ');
  const holders = new Map();
  for (const position of positions) {
    const k = slot(position.index);
    (holders.get(k) ?? holders.set(k, []).get(k)).push(position);
  }

  // The array.
  const width = 300, left = 44;
  const height = columns === 1 && rows > 1 ? 200 : Math.min(220, Math.max(70, 34 * rows));
  const array = drawn('svg', {class: 'grid', viewBox: `0 0 ${width + left + 4} ${height + 22}`, width: '100%'});
  const few = rows <= 64 && columns <= 64;
  for (let i = 0; few && i < rows; i++) for (let j = 0; j < columns; j++) {
    const k = i * columns + j, its = holders.get(k) ?? [];
    const w = width / columns, h = height / rows;
    const g = drawn('g', {}, drawn('rect', {class: 'box', style: `--hue:${hue(k)}`, rx: 4,
      x: left + j * w, y: i * h, width: w, height: h}));
    const room = Math.floor(w / 24);  // numbers of devices
    const label = its.length <= room ? its.map(p => p.number).join(', ') : `${its.length} devices`;
    if (w > 7 * label.length && h > 15) g.append(drawn('text', {x: left + (j + .5) * w, y: (i + .5) * h}, label));
    if (its.length) link(g, k, `${boxOf(its[0].index)} on ${its.slice(0, 8).map(names).join('; ')}${its.length > 8 ? ` and ${its.length - 8} more` : ''}`);
    array.append(g);
  }
  if (few && down >= 0) for (let i = 0; i < rows; i++) if (height / rows > 13)
    array.append(drawn('text', {class: 'end', x: left - 6, y: (i + .5) * height / rows}, range(down, i).split(':')[0]));
  if (few && across >= 0) for (let j = 0; j < columns; j++) if (width / columns > 30)
    array.append(drawn('text', {class: 'axis', x: left + (j + .5) * width / columns, y: height + 12}, range(across, j)));
  const drawnAxes = [down, across].filter(axis => axis >= 0);
  panel.append(made('h4', {}, `The array, split into ${rows * columns * others.reduce((n, axis) => n * parts[axis], 1)} boxes`));
  panel.append(few ? array : made('p', {class: 'dim'}, 'Too many boxes to draw.'));
  if (shape.length > drawnAxes.length) panel.append(made('p', {class: 'dim'},
    `Drawn: axis ${drawnAxes.join(' (down) and axis ')}${drawnAxes.length > 1 ? ' (across)' : ''}` +
    (others.length ? `; axis ${others.join(', ')} is split, too.` : '.')));

  // The mesh.
  const lines = mesh.length > 1 ? mesh[0][1] : 1, places = total / lines;
  if (lines <= 32 && places <= 64) {
    const side = Math.min(40, width / places);
    const grid = drawn('svg', {class: 'grid', viewBox: `0 0 ${width + left + 4} ${lines * side + 4}`, width: '100%'});
    for (const position of positions) {
      const i = Math.floor(position.number / places), j = position.number % places, k = slot(position.index);
      const g = drawn('g', {}, drawn('rect', {class: 'box', style: `--hue:${hue(k)}`, rx: 4,
        x: left + j * side, y: i * side, width: side, height: side}));
      if (side > 17) g.append(drawn('text', {x: left + (j + .5) * side, y: (i + .5) * side}, position.number));
      link(g, k, `Device ${position.number} of the mesh (${names(position)}) held ${boxOf(position.index)}`);
      grid.append(g);
    }
    const text = mesh.map(([name, size]) => `${name}=${size}`).join(', ');
    panel.append(made('h4', {}, `The mesh (${text})`), grid);
  }
  panel.append(held);
}

// --- the object graph --------------------------------------------------------------------

const graph = page.graph, HEIGHT = 24;
if (graph) {
  at('objects').hidden = false;
  // A row for each node below its first parent, one for each further edge, one for each group of slots.
  const rowOf = new Map();  // node -> its row
  const seen = new Set([0]);
  function row(parent, name, node, kind) {
    const found = {parent, name, node, kind, inside: [], isOpen: false};
    if (parent) parent.inside.push(found);
    return found;
  }
  const root = row(null, '(root)', 0, 'node');
  rowOf.set(0, root);
  const queue = [root], pending = [];
  for (const current of queue) {  // grows while it is walked
    const node = graph[current.node];
    for (const [name, child] of node.children) {
      if (seen.has(child)) { row(current, name, child, 'shared'); continue; }
      seen.add(child);
      const found = row(current, name, child, 'node');
      rowOf.set(child, found);
      queue.push(found);
    }
    const groups = new Map();
    for (const [name, variable, child] of node.slots) {
      if (!groups.has(name)) groups.set(name, row(current, name, null, 'slots'));
      pending.push([groups.get(name), variable, child]);
    }
  }
  for (const [group, variable, child] of pending) {
    const found = row(group, `of ${graph[variable].path || '(root)'}`, child, 'slot');
    found.variable = variable;
    if (!seen.has(child)) { seen.add(child); rowOf.set(child, found); }
  }
  root.isOpen = true;
  const level = [...root.inside];
  let count = 1 + root.inside.length;
  for (const each of level) {  // unfolds level by level, up to some dozens of rows
    if (!each.inside.length || count + each.inside.length > 34) continue;
    each.isOpen = true; count += each.inside.length; level.push(...each.inside);
  }

  const visible = found => {  // the row itself, or the closed one in which it lies
    const above = [];
    for (let up = found; up; up = up.parent) above.unshift(up);
    return above.find(each => !each.isOpen) ?? found;
  };
  function draw() {
    const panel = at('graph');
    panel.replaceChildren();
    const shown = [];
    (function walk(found, depth) {
      shown.push([found, depth]);
      if (found.isOpen) for (const each of found.inside) walk(each, depth + 1);
    })(root, 0);
    const lineOf = new Map(shown.map(([found], number) => [found, number]));
    const elements = shown.slice(0, 2000).map(([found, depth], number) => {
      const node = found.node === null ? null : graph[found.node];
      const line = made('div', {class: 'row'});
      line.style.marginLeft = `${depth * 20}px`;
      const turn = found.kind === 'shared' ? '\u21aa' : found.inside.length ? (found.isOpen ? '\u25be' : '\u25b8') : '\u00b7';
      const about = found.kind === 'shared' ? `is ${node.path || '(root)'}`
        : found.kind === 'slots' ? `slot of ${found.inside.length} ${found.inside.length === 1 ? 'variable' : 'variables'}`
        : [node.kind.split('.').pop(), ...node.values].filter(Boolean).join(' ');
      if (node?.kind) line.title = node.kind;
      line.append(made('span', {class: 'turn'}, turn), made('code', {}, found.name), ' ',
                  made('span', {class: 'dim'}, about));
      if (found.inside.length) {
        line.classList.add('opens');
        line.setAttribute('tabindex', 0);
        const toggle = () => { found.isOpen = !found.isOpen; draw(); };
        line.onclick = toggle;
        line.onkeydown = event => { if (event.key === 'Enter') toggle(); };
      } else if (node && byPath.has(node.path)) {
        line.classList.add('leads');
        line.onclick = () => choose(node.path, true);
      }
      line.onmouseenter = () => light(number, true);
      line.onmouseleave = () => light(number, false);
      panel.append(line);
      return line;
    });
    // Arcs from ends of rows: shared objects, and slots with their variables.
    const arcs = new Map();
    (function walk(found) {
      const target = found.kind === 'shared' ? rowOf.get(found.node) : found.kind === 'slot' ? rowOf.get(found.variable) : null;
      if (target) {
        const from = lineOf.get(visible(found)), to = lineOf.get(visible(target));
        if (from !== to && from < elements.length && to < elements.length)
          arcs.set(`${found.kind} ${from} ${to}`, [found.kind, from, to]);
      }
      found.inside.forEach(walk);
    })(root);
    const ends = elements.map(each => each.offsetLeft + each.offsetWidth + 4);
    const gutter = Math.max(...ends) + 10;  // no arc crosses a text
    const all = drawn('svg', {width: gutter + 240, height: elements.length * HEIGHT});
    const lines = [];
    for (const [kind, from, to] of arcs.values()) {
      const y1 = from * HEIGHT + HEIGHT / 2, y2 = to * HEIGHT + HEIGHT / 2, x = ends[to];
      const bulge = gutter + 20 + Math.min(30 * Math.sqrt(Math.abs(from - to)), 200);
      const path = drawn('path', {class: kind, d: `M${ends[from]},${y1} H${gutter} C${bulge},${y1} ${bulge},${y2} ${gutter},${y2} H${x}`});
      const head = drawn('path', {class: `${kind} head`, d: `M${x + 6},${y2 - 3.5} L${x},${y2} L${x + 6},${y2 + 3.5}`});
      all.append(path, head);
      lines.push([path, head, from, to]);
    }
    panel.append(all);
    function light(number, isOn) {
      const its = lines.filter(([, , from, to]) => from === number || to === number);
      for (const [path, head, from, to] of lines) {
        const isIts = from === number || to === number;
        for (const each of [path, head]) {
          each.classList.toggle('lit', isOn && isIts);
          each.classList.toggle('pale', isOn && its.length > 0 && !isIts);
        }
        if (isIts) for (const end of [from, to]) elements[end].classList.toggle('lit', isOn);
      }
    }
  }
  draw();
}
fill();
