"""Style and script of the report page; inline, because the page must work from a single file."""

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f27; --soft: #5c6575; --line: #e2e5ea; --paper: #ffffff;
  --shade: #f5f6f8; --edge: #00000038; --s0: #1f6fb4; --s1: #c2500a; --s2: #0b8562; --s3: #a8457f;
  --s4: #8a6d00; --s5: #5b51b5; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --soft: #98a1b2; --line: #2c313a;
  --paper: #14171c; --shade: #1c2027; --edge: #ffffff40; --s0: #6db3f2; --s1: #f59a5b; --s2: #4fcba4; --s3: #e58cc0;
  --s4: #dcc04c; --s5: #a79ff2; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; padding: 2.2rem 1.1rem 4rem; max-width: 72rem; background: var(--paper);
  color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; letter-spacing: -.01em; }
h2 { font-size: 1.15rem; margin: 2.6rem 0 .6rem; }
p { margin: .4rem 0; max-width: 46rem; }
p, figcaption { overflow-wrap: anywhere; }
.soft, figcaption, .ci, dt { color: var(--soft); }
.lead { font-size: 1.06rem; }
/* A shade lies at the right edge while there is more to scroll to: what covers it moves with the table. */
.scroll { overflow-x: auto; margin: .8rem 0; border: 1px solid var(--line); border-radius: 10px;
  background: linear-gradient(to left, var(--paper) 40%, transparent) right / 4rem 100% no-repeat local,
    linear-gradient(to left, var(--edge), transparent) right / 1.6rem 100% no-repeat scroll; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .55rem .7rem; text-align: right; white-space: nowrap; vertical-align: top; }
th { white-space: normal; font-weight: 600; font-size: .86rem; color: var(--soft); background: var(--shade); }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); }
th:first-child { background: var(--shade); }
tbody tr { border-top: 1px solid var(--line); }
.ci { display: block; font-size: .76rem; line-height: 1.25; white-space: normal; }
td:first-child .ci { max-width: 12rem; }
.swatch { display: inline-block; width: .72em; height: .72em; border-radius: 50%; margin-right: .5em; }
.best { font-weight: 650; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr));
  gap: .8rem 1.6rem; }
figure { margin: 0; }
.plots figcaption { font-weight: 600; font-size: .92rem; color: var(--ink); }
.plots figcaption span { font-weight: 400; color: var(--soft); }
.plot { width: 100%; height: auto; display: block; }
.plot text { font-family: inherit; fill: var(--soft); font-size: 12px; }
.plot .name { fill: currentColor; font-weight: 600; paint-order: stroke; stroke: var(--paper);
  stroke-width: 3px; }
.plot .grid { stroke: var(--line); } .plot .axis { stroke: var(--soft); }
.plot .dense { stroke: var(--soft); stroke-dasharray: 4 4; }
.plot .front { fill: none; stroke: var(--soft); stroke-width: 1.2; opacity: .6; }
.plot .bar { stroke: currentColor; stroke-width: 1.6; opacity: .55; } .plot .dot { fill: currentColor; }
.s0 { color: var(--s0); } .s1 { color: var(--s1); } .s2 { color: var(--s2); } .s3 { color: var(--s3); }
.s4 { color: var(--s4); } .s5 { color: var(--s5); } .swatch { background: currentColor; }
.prompt { margin: 1.5rem 0 .5rem; font-weight: 600; }
.prompt .soft { font-weight: 400; }
.clips { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(46%, 11.5rem), 1fr));
  gap: .7rem; }
.clips video, .clips img { width: 100%; display: block; border-radius: 6px; background: var(--shade); }
.clips figcaption { font-size: .84rem; line-height: 1.4; padding-top: .3rem; }
.clips figcaption b { color: var(--ink); font-weight: 600; }
button { font: inherit; color: inherit; background: var(--shade); border: 1px solid var(--line);
  border-radius: 8px; padding: .35rem .9rem; cursor: pointer; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.2rem; margin: .6rem 0; }
dd { margin: 0; overflow-wrap: anywhere; }
code { font: .88em/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
details { margin: 2rem 0 1rem; } details td { font-size: .88rem; }
summary { cursor: pointer; font-weight: 600; }
li { margin: .25rem 0; overflow-wrap: anywhere; }
@media (max-width: 34rem) { body { padding-top: 1.3rem; } dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: .6rem; } th, td { padding: .5rem .45rem; }
  td:first-child { white-space: normal; overflow-wrap: anywhere; min-width: 6.5rem; max-width: 8rem; } }
"""

SCRIPT = """
const rows = [...document.querySelectorAll('.clips')];
const films = row => [...row.querySelectorAll('video')];
// Only what is on screen plays, and the clips of one prompt start together.
const seen = new IntersectionObserver(entries => entries.forEach(entry => {
  for (const film of films(entry.target)) {
    if (entry.isIntersecting && !paused) { film.currentTime = 0; film.play().catch(() => {}); }
    else film.pause();
  }
}), { rootMargin: '80px' });
let paused = false;
rows.forEach(row => seen.observe(row));
const button = document.querySelector('#play');
if (button) button.onclick = () => {
  paused = !paused;
  button.textContent = paused ? 'Play' : 'Pause';
  seen.disconnect();
  rows.flatMap(films).forEach(film => film.pause());
  if (!paused) rows.forEach(row => seen.observe(row));
};
"""
