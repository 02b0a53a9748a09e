"""The style sheet of report.html."""

STYLE = """\
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: #222; font: 16px/1.55 system-ui,
  -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 74rem; margin: 0 auto; padding: 2.5rem 1.5rem 4rem; }
p { max-width: 46rem; margin: 0 0 1em; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 1rem; font-weight: 650; }
h1 + p { font-size: 1.1rem; line-height: 1.5; max-width: 52rem; }
h2 { font-size: 1.25rem; margin: 2.8rem 0 .8rem; font-weight: 650; }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; font-weight: 650; }
ul { max-width: 46rem; margin: 0 0 1em; padding: 0; list-style: none; }
li + li { margin-top: .5em; }
a { color: #0b5c96; }
code { font: .88em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  background: #f4f4f4; padding: .08em .3em; border-radius: 3px;
  overflow-wrap: anywhere; }
.table { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; min-width: 50%; font-size: .86rem; line-height: 1.4;
  font-variant-numeric: tabular-nums; border-top: 1.5px solid #222;
  border-bottom: 1.5px solid #222; }
th { font-weight: 600; vertical-align: bottom; border-bottom: 1px solid #222; }
th, td { padding: .38rem .5rem; text-align: left; }
td { vertical-align: top; border-bottom: 1px solid #e8e8e8; }
tr:last-child td { border-bottom: 0; }
th:first-child, td:first-child { padding-left: .2rem; }
th:last-child, td:last-child { padding-right: .2rem; }
td[style*="right"], td > strong, tr:has(strong[class]) td:nth-child(2) {
  white-space: nowrap; }
.table + p { font-size: .88rem; color: #555; }
figure { margin: 1.8rem 0; }
img { display: block; width: 100%; max-width: 66rem; height: auto; }
figcaption { max-width: 46rem; margin-top: .5rem; font-size: .88rem; color: #555; }
strong.D { color: #3a3a3a; } strong.A { color: #0072b2; }
strong.B { color: #c25500; } strong.C { color: #007f5f; }
strong.E { color: #a8527f; } strong.F { color: #8a6d00; } strong.G { color: #2f7fa8; }
@media print {
  @page { margin: 14mm; }
  :root { font-size: 9.5pt; }
  body { font-size: 1rem; }
  main { max-width: none; padding: 0; }
  table { font-size: 7.6pt; }
  th, td { padding: .25rem .3rem; }
  .table { overflow: visible; }
  h2, h3, h2 + p { break-after: avoid; }
  figure, tr, li { break-inside: avoid; }
  a { color: inherit; text-decoration: none; }
}
"""
