"""The style of report.html: readable at 1100 pixels, on a phone and on paper."""

CSS = """
:root { color-scheme: light; --ink: #1d2430; --soft: #5c6675; --line: #e3e6ea; --blue: #0072b2; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 44px 28px 64px; }
.tag { color: var(--soft); font-size: .84rem; letter-spacing: .02em; }
.tag b { color: #8a4b00; background: #fff3df; border-radius: 4px; padding: 2px 8px; margin-left: 8px; font-weight: 600; }
h1 { font-size: 1.9rem; line-height: 1.28; font-weight: 650; letter-spacing: -.012em; margin: .5rem 0 1.1rem; max-width: 34em; text-wrap: balance; }
h2 { font-size: 1.12rem; margin: 2.6rem 0 .7rem; }
ul.said { margin: 0; padding-left: 1.1em; color: #333d4b; max-width: 62em; }
ul.said li { margin: .18rem 0; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 0 28px; margin: 1.8rem 0 .6rem; border-top: 1px solid var(--line); }
.facts div { padding: 12px 0; border-bottom: 1px solid var(--line); }
.facts b { display: block; font-size: 1.35rem; font-weight: 620; letter-spacing: -.01em; }
.facts span { color: var(--soft); font-size: .84rem; }
.figures { display: grid; grid-template-columns: 1fr 1fr; gap: 34px 36px; margin-top: 2rem; }
figure { margin: 0; min-width: 0; }
figure.wide { grid-column: 1 / -1; }
figure img { width: 100%; display: block; }
figcaption { color: var(--soft); font-size: .86rem; margin-bottom: .35rem; }
figcaption b { color: var(--ink); display: block; font-size: .98rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; }
th { text-align: left; color: var(--soft); font-weight: 500; padding: 5px 22px 5px 0; border-bottom: 1px solid #b9c0c9; vertical-align: bottom; }
td { padding: 3px 22px 3px 0; vertical-align: top; white-space: nowrap; }
tr.group td { border-top: 1px solid var(--line); padding-top: 7px; }
tr.group:first-child td { border-top: 0; }
tr.ticket td { color: var(--blue); font-weight: 600; }
td.text { white-space: normal; overflow-wrap: anywhere; min-width: 16em; }
p.note { color: var(--soft); font-size: .84rem; max-width: 62em; margin: .6rem 0 0; }
.two { display: grid; grid-template-columns: 1fr 1fr; gap: 0 44px; }
footer { margin-top: 3rem; border-top: 1px solid var(--line); padding-top: 1rem; color: var(--soft); font-size: .84rem; }
a { color: var(--blue); }
h2 + figure { margin-bottom: 1.1rem; }
@media (max-width: 800px) { main { padding: 24px 16px 48px; } figure.wide img { min-width: 860px; } .figures, .two { grid-template-columns: minmax(0, 1fr); } h1 { font-size: 1.5rem; } }
@media print { main { padding: 0; max-width: none; } figure, table { break-inside: avoid; } }
"""
