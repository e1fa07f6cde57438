// Search without a server: browsers refuse `new Worker` on file:// pages, so the script of the worker runs in a hidden frame.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.append(frame)
      this.scope = frame.contentWindow
      const load = (src) =>
        new Promise((resolve, reject) => {
          const script = this.scope.document.createElement("script")
          Object.assign(script, { src, onload: resolve, onerror: reject })
          this.scope.document.body.append(script)
        })
      this.scope.importScripts = (...urls) => urls.reduce((done, one) => done.then(() => load(one)), Promise.resolve())
      this.scope.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }))
      this.ready = load(String(url))
    }

    postMessage(data) {
      this.ready.then(() => this.scope.dispatchEvent(new MessageEvent("message", { data })))
    }

    terminate() {
      this.scope.frameElement.remove()
    }
  }
}
