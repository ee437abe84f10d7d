// Marks the edges of a box behind which there is more to scroll to; page.css draws a shadow there.
function watchEdges(box) {
  const mark = () => {
    const right = box.scrollWidth - box.clientWidth - box.scrollLeft, bottom = box.scrollHeight - box.clientHeight - box.scrollTop;
    for (const [edge, more] of [["left", box.scrollLeft], ["right", right], ["top", box.scrollTop], ["bottom", bottom]])
      box.toggleAttribute(`data-more-${edge}`, more > 1);
  };
  box.classList.add("scrolls");
  box.addEventListener("scroll", mark, { passive: true });
  new ResizeObserver(mark).observe(box);
  new MutationObserver(mark).observe(box, { childList: true, subtree: true });
  mark();
}
