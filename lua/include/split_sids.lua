-- Take a user's list of connections apart: '<length of the sid>:<sid>' for each, in the order of registration.
local function split_sids(list)
  local sids, position = {}, 1
  while list and position <= #list do
    local colon = string.find(list, ':', position, true)
    local last = colon + string.sub(list, position, colon - 1)
    sids[#sids + 1] = string.sub(list, colon + 1, last)
    position = last + 1
  end
  return sids
end
