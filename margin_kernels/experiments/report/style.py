"""The style of every page: no script, nothing loaded. A table that is wider than its box scrolls in it; a shadow at the
right edge says that there is more, and on a phone a line above says so too."""

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 72rem; color: #1a1a1a; background: #fff;
       font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0; }
h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; border-bottom: 1px solid #ccc; padding-bottom: .2rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .4rem; }
p { max-width: 46rem; }
.takeaway { border-left: .3rem solid #0072B2; background: #f2f7fb; padding: .5rem .9rem; max-width: 50rem; }
.takeaway p { margin: .3rem 0; font-size: .9rem; }
.takeaway p:first-child { font-size: 1.1rem; }
.note { font-size: .85rem; color: #444; margin: .4rem 0; }
.doubt { color: #9a3b00; font-weight: 600; }
/* a white veil at the end of the table scrolls with it and covers the shadow, which stays, where there is no more */
.scroll { overflow-x: auto; -webkit-overflow-scrolling: touch; width: fit-content; max-width: 100%;
          background: linear-gradient(to left, #fff 1rem, rgba(255, 255, 255, 0)) right / 2rem 100% no-repeat local,
                      linear-gradient(to left, rgba(0, 0, 0, .35), rgba(0, 0, 0, 0)) right / 1rem 100% no-repeat; }
.more { display: none; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; text-align: right; white-space: nowrap; vertical-align: top; }
thead th, .compared td:nth-child(2) { white-space: normal; }
th:first-child, td:first-child { text-align: left; padding-left: 0; position: sticky; left: 0; background: #fff; }
thead th { border-bottom: 2px solid #1a1a1a; vertical-align: bottom; }
tbody tr + tr td { border-top: 1px solid #e4e4e4; }
td small { display: block; font-size: .75em; font-weight: 400; color: #555; line-height: 1.2; }
td small.doubt { color: #9a3b00; font-weight: 600; }
tr.section td { font-weight: 600; padding-top: .8rem; position: static; }
tr.section span { position: sticky; left: 0; }
td.best { font-weight: 700; }
tr.chosen td { background: #d8e9f5; font-weight: 600; }
tr.chosen td:first-child { box-shadow: inset .3rem 0 #0072B2; padding-left: .6rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); gap: 1rem; }
.figures.wide { grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); }
figure.broad { grid-column: 1 / -1; max-width: 48rem; }
figure { margin: 0; }
figure img { width: 100%; height: auto; display: block; }
figcaption { font-size: .85rem; color: #444; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; font-size: .9rem; }
dt { color: #444; } dd { margin: 0; overflow-wrap: anywhere; }
pre { overflow-x: auto; background: #f5f5f5; padding: .7rem; font-size: .8rem; line-height: 1.35; }
summary { cursor: pointer; }
.glossary dt { color: #1a1a1a; font-weight: 600; }
@media (max-width: 40rem) {
  body { padding: .7rem; font-size: 15px; }
  table { font-size: .8rem; }
  th, td { padding: .2rem .35rem; }
  td:first-child { white-space: normal; min-width: 7rem; max-width: 9rem; }
  .more { display: block; font-size: .8rem; color: #444; margin: .3rem 0; }
  .glossary dl { grid-template-columns: 1fr; } .glossary dd { margin-bottom: .4rem; }
}
"""
