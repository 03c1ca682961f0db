"""The style of the page: light, dark, narrow, wide and printed."""

from __future__ import annotations

LIGHT = """
--paper:#fdfdfb;--ink:#1c2321;--soft:#5f6b67;--faint:#dfe4e1;--wash:#f2f5f3;
--main:#0f6e63;--second:#b3541e;--bad:#a3312a
"""
DARK = """
--paper:#131817;--ink:#e4e9e6;--soft:#93a19c;--faint:#2b3432;--wash:#1a2120;
--main:#5bc4b3;--second:#e39a62;--bad:#ee8a80
"""

STYLE = f"""
:root{{color-scheme:light;{LIGHT.strip()}}}
@media(prefers-color-scheme:dark){{:root{{color-scheme:dark;{DARK.strip()}}}}}
""" + """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);
font:400 1rem/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;
print-color-adjust:exact;-webkit-print-color-adjust:exact}
main{max-width:66rem;margin:0 auto;padding:clamp(1.5rem,5vw,4rem) clamp(1rem,4vw,2.5rem)}
p,h1,h2,h3,dl,dd,figure{margin:0}
.kicker{color:var(--main);font-weight:600;font-size:.85rem;letter-spacing:.02em}
h1{font-size:clamp(1.9rem,5vw,2.75rem);line-height:1.15;font-weight:650;letter-spacing:-.02em;
margin:.15rem 0 .6rem;overflow-wrap:anywhere}
.summary{font-size:1.1rem;max-width:44rem;color:var(--ink)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,10.5rem),1fr));
gap:1.5rem 1.75rem;margin-top:2.25rem}
.tile{border-top:2px solid var(--ink);padding-top:.6rem;min-width:0}
.label{font-size:.8rem;color:var(--soft)}
.value{font-size:1.3rem;line-height:1.3;font-weight:600;letter-spacing:-.015em;
font-variant-numeric:tabular-nums;margin:.1rem 0 .2rem}
.value.name{overflow-wrap:anywhere}
.detail{font-size:.8rem;line-height:1.4;color:var(--soft);font-variant-numeric:tabular-nums}
section{margin-top:3.5rem;border-top:1px solid var(--faint);padding-top:1.25rem}
h2{font-size:1.4rem;line-height:1.3;font-weight:620;letter-spacing:-.01em}
h3{font-size:1rem;font-weight:600;margin-top:1.75rem}
.lead{color:var(--soft);max-width:46rem;margin-top:.2rem}
.note{color:var(--soft);font-size:.85rem;max-width:46rem;margin-top:.9rem}
h3+.note{margin-top:.1rem}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,21rem),1fr));
gap:1.75rem 2.25rem;margin-top:1.25rem;align-items:start}
.charts.three{grid-template-columns:repeat(auto-fill,minmax(min(100%,17rem),1fr))}
.charts>*{min-width:0}
figcaption{display:flex;flex-wrap:wrap;align-items:baseline;gap:0 .9rem;font-size:.85rem;
margin-bottom:.3rem}
figcaption .title{font-weight:600}
.remark,.legend{color:var(--soft);font-size:.8rem}
.legend{display:inline-flex;align-items:center;gap:.35rem}
svg{display:block;width:100%;height:auto;overflow:visible}
svg.sample{width:22px;height:8px;flex:none}svg.sample.dot{width:8px}
.stack{display:grid;gap:1.25rem}
svg text{fill:var(--soft);font-size:12px;font-variant-numeric:tabular-nums}
svg text.strong{fill:var(--ink);font-weight:600}
.grid{stroke:var(--faint);stroke-width:1}
.zero{stroke:var(--soft);stroke-width:1.2}
.line{fill:none;stroke-width:1.8;stroke-linejoin:round;stroke-linecap:round}
.line.main{stroke:var(--main)}
.line.second{stroke:var(--second);stroke-width:1.4;stroke-dasharray:5 3.5}
.line.quiet{stroke:var(--soft);stroke-width:1.3;stroke-dasharray:1 3.2}
.dot{stroke:var(--main);stroke-width:1.6}
.dot.main{fill:var(--main)}.dot.plain{fill:var(--paper);stroke:var(--soft)}
.whisker{fill:none;stroke-width:1.6}
.whisker.main{stroke:var(--main)}.whisker.plain{stroke:var(--soft)}
.ring{fill:var(--paper);stroke:var(--main);stroke-width:2}
.mark line{stroke:var(--soft);stroke-width:1;stroke-dasharray:2 2.5;opacity:.75}
.mark text{font-size:10px;fill:var(--soft)}
.mark.killed text,.mark.failed text{fill:var(--bad);font-weight:700}
.band.lost{fill:var(--second);opacity:.28}
.band.waiting{fill:var(--soft);opacity:.16}
rect.right{fill:var(--main)}rect.wrong{fill:var(--second)}
rect.right,rect.wrong{stroke:var(--faint);stroke-width:1}
svg text.deep{fill:var(--paper);font-weight:600}svg text.shallow{fill:var(--ink);font-weight:600}
.scroll{overflow-x:auto;margin-top:.6rem;background:
linear-gradient(90deg,var(--paper) 40%,transparent) 0/2rem 100% no-repeat local,
linear-gradient(270deg,var(--paper) 40%,transparent) 100%/2rem 100% no-repeat local,
linear-gradient(90deg,var(--faint),transparent) 0/.7rem 100% no-repeat scroll,
linear-gradient(270deg,var(--faint),transparent) 100%/.7rem 100% no-repeat scroll}
.scroll:focus-visible{outline:2px solid var(--main);outline-offset:2px}
.beside .scroll{margin-top:0}
table{border-collapse:collapse;font-size:.875rem;line-height:1.4;min-width:min(100%,24rem)}
th{font-weight:500;color:var(--soft);text-align:left;vertical-align:bottom;
border-bottom:1px solid var(--soft)}
td{border-bottom:1px solid var(--faint);vertical-align:top}
th,td{padding:.35rem 1.1rem .35rem 0;white-space:nowrap}
th:last-child,td:last-child{padding-right:0}
td:last-child:not(.number){white-space:normal;min-width:10rem}
.beside td:last-child:not(.number){min-width:8.5rem}
.number{text-align:right;font-variant-numeric:tabular-nums}
tr.marked td{font-weight:600}
.limits{color:var(--soft);font-weight:400;font-size:.8rem}
code{font:.8rem/1.4 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
.bar{display:flex;height:1.75rem;gap:2px;margin-top:1.25rem}
.bar span{min-width:2px}
.swatch{display:inline-block;width:.8rem;height:.8rem;margin-right:.5rem;vertical-align:-.08rem}
.useful{background:var(--main)}
.recomputed{background:repeating-linear-gradient(45deg,var(--second) 0 3px,var(--paper) 3px 5px)}
.saving{background:var(--ink)}
.starting{background:color-mix(in srgb,var(--soft) 75%,var(--paper))}
.restarting{background:repeating-linear-gradient(90deg,var(--soft) 0 2px,var(--paper) 2px 4px)}
.waiting{background:var(--faint)}
.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,14rem),1fr));
gap:.5rem 2rem;margin-top:.9rem}
dt{color:var(--soft);font-size:.8rem}
dd{font-size:.9rem;overflow-wrap:anywhere;font-variant-numeric:tabular-nums}
.columns{columns:18rem 3;column-gap:2.25rem}
.group{break-inside:avoid;padding-bottom:1.4rem}
.group h3{margin:0 0 .2rem;border-bottom:1px solid var(--faint);padding-bottom:.2rem}
.group dl div{display:flex;justify-content:space-between;gap:1rem;padding:.12rem 0}
.group dt,.group dd{font-size:.82rem;line-height:1.45}
.group dd{text-align:right;min-width:0}
.columns{margin-top:1.1rem}
strong{font-weight:650}
.sentences{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,26rem),1fr));
gap:0 2.25rem;margin-top:.9rem}
article{border-top:1px solid var(--faint);padding:.7rem 0 .9rem;break-inside:avoid}
article p{display:grid;grid-template-columns:5.2rem 1fr;align-items:baseline;overflow-wrap:anywhere}
article span{color:var(--soft);font-size:.8rem}
article .model{font-weight:600}article .model span{font-weight:400}
footer{margin-top:3.5rem;border-top:1px solid var(--faint);padding-top:.8rem;color:var(--soft);
font-size:.8rem}
@media print{
:root{color-scheme:light;LIGHT;--paper:#fff}
@page{margin:16mm 14mm}
body{font-size:10pt}main{max-width:none;padding:0}
section{margin-top:1.6rem;padding-top:.8rem}
h2,h3,.lead,.note{break-after:avoid}
figure,tr,.tile,.bar{break-inside:avoid}
.scroll{overflow:visible;background:none}td,th{white-space:normal;padding-right:.8rem}
td:first-child{white-space:nowrap}td:last-child:not(.number),
.beside td:last-child:not(.number){min-width:0}
.charts{grid-template-columns:repeat(2,1fr)}.charts.three{grid-template-columns:repeat(3,1fr)}
.tiles{grid-template-columns:repeat(5,1fr);gap:1rem}.value{font-size:1.15rem}
}
""".replace("LIGHT;", LIGHT.strip() + ";")
