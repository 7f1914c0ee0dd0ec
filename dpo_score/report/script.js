(function () {
  "use strict";
  var form = document.getElementById("controls");
  var list = document.getElementById("pairs");
  if (form && list) {
    var items = Array.prototype.slice.call(list.children);
    var count = document.getElementById("count");
    var texts = items.map(function (item) { return item.textContent.toLowerCase(); });
    var number = function (item, key) {
      var value = parseFloat(item.getAttribute("data-" + key));
      return isNaN(value) ? Infinity : value;
    };
    var update = function () {
      var words = form.elements.words.value.toLowerCase().trim();
      var tag = form.elements.tag.value, subset = form.elements.subset.value;
      var shown = 0;
      items.forEach(function (item, index) {
        var fits = (!words || texts[index].indexOf(words) >= 0) &&
          (!tag || item.getAttribute("data-tags").split("|").indexOf(tag) >= 0) &&
          (!subset || item.getAttribute("data-subset") === subset);
        item.hidden = !fits;
        if (fits) { shown += 1; }
      });
      var parts = form.elements.order.value.split(":");
      items.slice().sort(function (a, b) {
        var difference = number(a, parts[0]) - number(b, parts[0]);
        return (parts[1] === "down" ? -difference : difference) || items.indexOf(a) - items.indexOf(b);
      }).forEach(function (item) { list.appendChild(item); });
      count.textContent = shown + " of " + items.length + " pairs";
    };
    form.addEventListener("input", update);
    form.addEventListener("change", update);
    form.addEventListener("submit", function (event) { event.preventDefault(); });
    form.addEventListener("reset", function () { setTimeout(update, 0); });
    form.hidden = false;
    update();
  }
  window.addEventListener("beforeprint", function () {
    Array.prototype.forEach.call(document.querySelectorAll("details"), function (one) { one.open = true; });
  });
})();
