-- Sends each request to the member with the fewest outstanding rows, which callers state in a header.
-- Envoy does not tell a script when a caller leaves, so canceled requests would stay in the count.
local outstanding = { MEMBERS }

function envoy_on_request(handle)
  local rows = tonumber(handle:headers():get("x-imprompt-rows") or "0")
  local chosen = nil
  for member, count in pairs(outstanding) do
    if chosen == nil or count < outstanding[chosen] then
      chosen = member
    end
  end
  outstanding[chosen] = outstanding[chosen] + rows
  local metadata = handle:streamInfo():dynamicMetadata()
  metadata:set("imprompt", "member", chosen)
  metadata:set("imprompt", "rows", rows)
  handle:setUpstreamOverrideHost(chosen, false)
end

function envoy_on_response(handle)
  local own = handle:streamInfo():dynamicMetadata():get("imprompt")
  local member, rows = own["member"], own["rows"]
  for _ in handle:bodyChunks() do
  end
  outstanding[member] = outstanding[member] - rows
end
