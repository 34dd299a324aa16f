// Wide tables scroll; with this they can be scrolled by keys, too.
const reach = () => { for (const e of document.querySelectorAll(".md-typeset__scrollwrap")) e.tabIndex = 0; };
addEventListener("load", () => setTimeout(reach, 50));
