// Thumbnails of the run's images. `pictures`: WebP in base64 by SHA-256 of the image.

let run, pictures;

function picture(image, attributes = {}) {
  const name = shown(run.images.id[image] ?? "");
  const content = pictures[run.images.sha256[image]];
  const holder = make(attributes.onclick ? "button" : "div", { class: "picture", title: name, ...(attributes.onclick ? { type: "button" } : {}), ...attributes });
  if (!content) {
    holder.append(make("span", {}, "no picture"));
    return holder;
  }
  const element = make("img", { src: "data:image/webp;base64," + content, alt: name, decoding: "async", loading: "lazy" });
  element.addEventListener("load", () => { if (element.naturalWidth <= 64) element.classList.add("tiny"); });
  holder.append(element);
  return holder;
}

const className = (number) => (number < 0 ? "(no class)" : run.classes[number]);
